"""What else people do with a model, under every mechanism of attaching: does it still give the right values?

Each check runs a small network with one mechanism and compares outputs and gradients of the trained factors with those
of the same network written by hand, in plain eager PyTorch. A check that only runs proves nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ..errors import GraftError, nearest
from .cases import (
    Case,
    Values,
    assert_close,
    assert_near,
    assert_same,
    double,
    fresh_compiler,
    grads,
    loss,
    one_process,
)
from .mechanisms import mechanisms, trained


@dataclasses.dataclass(frozen=True)
class Cell:
    """The outcome of one check under one mechanism.

    Attributes:
        check: Name of the check.
        mechanism: Name of the mechanism.
        reason: Why it failed; empty when it passed.
    """

    check: str
    mechanism: str
    reason: str


def measure(
    checks: list[str], *, level: str | bool = True, say: Callable[[str], None] = lambda name: None
) -> list[Cell]:
    """Run checks under every mechanism.

    Args:
        checks: Names among ``CHECKS``.
        level: Level of torchgraft's lean layers.
        say: Called with the name of each check.

    Raises:
        GraftError: A level whose values are not those of the network written by hand.
    """
    if level == "compact":
        raise GraftError("level compact is approximate: see `torchgraft bench equal`; expected a level that is exact")
    cells = []
    for name in checks:
        say(name)
        for mechanism, attach_by in mechanisms(level).items():
            cells.append(Cell(name, mechanism, attempt(name, Case(mechanism, attach_by))))
    return cells


def chosen(names: list[str] | None) -> list[str]:
    """The names of checks, all for None.

    Raises:
        GraftError: There is no such check.
    """
    for name in names or ():
        if name not in CHECKS:
            raise GraftError(f"check {name!r}: {nearest(name, CHECKS)}")
    return names or list(CHECKS)


def attempt(check: str, case: Case) -> str:
    """Run one check; returns why it failed, in one line, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CHECKS[check](case)
    except Exception as error:  # whatever goes wrong is the answer
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"[:160]
    return ""


# -- the checks -----------------------------------------------------------------------------------------------


def eager(case: Case) -> None:
    """Values of a plain forward and backward."""
    assert_same(case.run(case.model()), case.wanted())


def compiles(case: Case) -> None:
    """``torch.compile`` into one graph, forward and backward."""
    with fresh_compiler():
        compiled: Any = torch.compile(case.model(), fullgraph=True, backend="aot_eager")
        assert_same(case.run(compiled), case.wanted())


def exports(case: Case) -> None:
    """``torch.export``."""
    program = torch.export.export(case.model(), (case.x,))
    assert_close(program.module()(case.x), case.wanted()[0])


def traces(case: Case) -> None:
    """``torch.fx.symbolic_trace``."""
    assert_close(torch.fx.symbolic_trace(case.model())(case.x), case.wanted()[0])


def deep_copies(case: Case) -> None:
    """A deep copy is independent: other factors change the copy alone."""
    model = case.model()
    copied = copy.deepcopy(model)
    assert_same(case.run(copied), case.wanted())
    hand = case.hand()
    for changed in (copied, hand):
        double(changed)
    assert_same(case.run(copied), case.run(hand))
    assert_same(case.run(model), case.wanted())


def pickles(case: Case) -> None:
    """``torch.save`` of the module and back."""
    file = io.BytesIO()
    torch.save(case.model(), file)
    file.seek(0)
    assert_same(case.run(torch.load(file, weights_only=False)), case.wanted())


def functional_call(case: Case) -> None:
    """``functional_call`` with other values of the factors."""
    model, hand = case.model(), case.hand()
    state = {n: t.detach() * (2 if t.requires_grad else 1) for n, t in model.named_parameters()}
    double(hand)
    assert_close(torch.func.functional_call(model, state, (case.x,)), hand(case.x))


def vmaps(case: Case) -> None:
    """``vmap`` over the images."""
    model = case.model()
    assert_close(torch.func.vmap(lambda image: model(image[None])[0])(case.x), case.wanted()[0])


def functional_grad(case: Case) -> None:
    """``torch.func.grad``, and per image under ``vmap``."""
    model = case.model()
    factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def value(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, values, (x,)))

    found = torch.func.grad(value)(factors, case.x)
    assert_same((model(case.x), list(found.values())), case.wanted())
    rows = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(factors, case.x[:, None])
    assert_same((model(case.x), [g.sum(0) for g in rows.values()]), case.wanted())


def data_parallel(case: Case) -> None:
    """``DistributedDataParallel`` over gloo, one process."""
    with one_process():
        model = case.model()
        parallel = nn.parallel.DistributedDataParallel(model)
        out = parallel(case.x)
        loss(out).backward()
        assert_same((out, grads(model)), case.wanted())


def fully_sharded(case: Case) -> None:
    """FSDP2: every block and the root are sharded, one process."""
    from torch.distributed.fsdp import fully_shard

    with one_process():
        model = case.model()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        out = model(case.x)
        loss(out).backward()
        assert_same((out, [g.full_tensor() for g in grads(model)]), case.wanted())  # type: ignore[attr-defined]


def checkpoints(case: Case, *, reentrant: bool) -> None:
    """Gradient checkpointing of the blocks."""
    model, hand = case.model(), case.hand()
    model.segment = functools.partial(checkpoint, use_reentrant=reentrant)
    x = case.x.clone().requires_grad_()
    results: list[Values] = []
    for one in (model, hand):
        out = one(x)
        loss(out).backward()
        assert x.grad is not None
        results.append((out, [*grads(one), x.grad]))
        x.grad = None
    assert_same(*results)


def saves_on_cpu(case: Case) -> None:
    """``save_on_cpu``: what is kept for the backward is moved out and back."""
    with torch.autograd.graph.save_on_cpu():
        found = case.run(case.model())
    assert_same(found, case.wanted())


def autocasts(case: Case) -> None:
    """Autocast to bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = case.run(case.model()), case.wanted()
    for a, b in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        assert_near(a.float(), b.reshape(a.shape).float())


def channels_last(case: Case) -> None:
    """Channels-last memory."""
    model = case.model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_same(case.run(model, case.x.to(memory_format=torch.channels_last)), case.wanted())


def double_backward(case: Case) -> None:
    """The gradient of a function of gradients."""
    results = []
    for model in (case.model(), case.hand()):
        out = model(case.x)
        first = torch.autograd.grad(loss(out), trained(model), create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        results.append((out, list(torch.autograd.grad(total, trained(model)))))
    assert_same(*results)


def forward_mode(case: Case) -> None:
    """Forward-mode AD: the change of the output with the input, while reverse mode is on."""
    changes = []
    for model in (case.model(), case.hand()):
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(case.x, torch.ones_like(case.x)))
            changes.append(forward_ad.unpack_dual(out).tangent)
    assert_close(*changes)


def attaches_after_compiling(case: Case) -> None:
    """A model that was compiled and run before notices what is attached later."""
    with fresh_compiler():
        # Frozen before, so that nothing but the branch is new: a change of any flag would be noticed by itself.
        model = case.plain().requires_grad_(False)
        compiled: Any = torch.compile(model, backend="aot_eager")
        assert_close(compiled(case.x), model(case.x))
        case.attach_by(model, case.x)
        assert_same(case.run(compiled), case.wanted())


def loads_plain_checkpoints(case: Case) -> None:
    """A checkpoint of the plain network loads, and its values are used."""
    model = case.model()
    unexpected = model.load_state_dict(case.plain(seed=1).state_dict(), strict=False).unexpected_keys
    if unexpected:
        raise AssertionError(f"the checkpoint's keys are unknown here, such as {unexpected[0]}")
    assert_same(case.run(model), case.run(case.hand(seed=1)))


CHECKS: dict[str, Callable[[Case], None]] = {
    "eager": eager,
    "compile, fullgraph": compiles,
    "export": exports,
    "fx trace": traces,
    "deepcopy": deep_copies,
    "pickle": pickles,
    "functional_call": functional_call,
    "vmap": vmaps,
    "func.grad": functional_grad,
    "DDP": data_parallel,
    "FSDP2": fully_sharded,
    "checkpoint": functools.partial(checkpoints, reentrant=False),
    "checkpoint, reentrant": functools.partial(checkpoints, reentrant=True),
    "save_on_cpu": saves_on_cpu,
    "autocast": autocasts,
    "channels_last": channels_last,
    "double backward": double_backward,
    "forward-mode AD": forward_mode,
    "attach after compile": attaches_after_compiling,
    "plain checkpoint": loads_plain_checkpoints,
}
"""Name of a check and the check: it raises when something is not as it should be."""
