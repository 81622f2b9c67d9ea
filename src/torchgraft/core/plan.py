"""Plans: what a method would add to a model, before anything is attached."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .adapter import HEAD_SLOT, activate, attach, build
from .anatomy import Anatomy
from .frozen import own_parameters
from .method import Method
from .method import method as resolve
from .probe import Example, guesses


@dataclasses.dataclass(frozen=True)
class PlannedSite:
    """One placement of a plan.

    Attributes:
        address: Canonical address of the module it belongs to.
        path: Module path.
        kind: Kind of placement.
        parameters: Trainable values it adds (shared ones counted at their first site).
        layer_parameters: Values of the layer it stands at.
    """

    address: str
    path: str
    kind: str
    parameters: int
    layer_parameters: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; prints as a table.

    Attributes:
        method: The method in its string form.
        architecture: Name of the backbone.
        sites: One row per placement, without the head.
        parameters: Trainable values without the head.
        head_parameters: Values of the head (0 without ``num_classes``).
        backbone_parameters: Values of the backbone without its classifier.
        input: Shape of the input that the costs below refer to, batch included (1).
        flops: Multiply-adds times two of the plain forward for that input; None when unknown.
        flops_added: What the method adds to it.
        saved_bytes: Bytes that autograd keeps for the backward of one input, plain path; None when unknown.
        file_bytes: Size of the adapter's tensors in float32.
    """

    method: str
    architecture: str
    sites: tuple[PlannedSite, ...]
    parameters: int
    head_parameters: int
    backbone_parameters: int
    input: tuple[int, ...] | None
    flops: int | None
    flops_added: int | None
    saved_bytes: int | None
    file_bytes: int

    @property
    def percent(self) -> float:
        """Trainable values without the head in per cent of the backbone's."""
        return 100 * self.parameters / max(self.backbone_parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {**dataclasses.asdict(self), "percent": self.percent}

    def __str__(self) -> str:
        width = max([len("site"), *(len(s.address) for s in self.sites)])
        rows = [f"{'site':<{width}}  {'kind':<10}  {'parameters':>12}  {'of layer':>9}"]
        for s in self.sites:
            share = f"{s.parameters / s.layer_parameters:>8.2f}x" if s.layer_parameters else f"{'-':>9}"
            rows.append(f"{s.address:<{width}}  {s.kind:<10}  {s.parameters:>12,}  {share}")
        rows += [
            f"{'total':<{width}}  {'':<10}  {self.parameters:>12,}  "
            f"({self.percent:.2f} % of {self.architecture}'s {self.backbone_parameters:,})",
        ]
        if self.head_parameters:
            rows.append(f"{'head':<{width}}  {'':<10}  {self.head_parameters:>12,}")
        if self.flops is not None and self.flops_added is not None:
            more = 100 * self.flops_added / max(self.flops, 1)
            rows.append(
                f"forward: {self.flops / 1e9:.2f} GFLOP + {self.flops_added / 1e9:.3f} ({more:+.1f} %) "
                f"for input {self.input}"
            )
        if self.saved_bytes is not None:
            rows.append(f"kept for the backward: {self.saved_bytes / 2**20:.1f} MiB per input (plain path)")
        rows.append(f"adapter file: {self.file_bytes / 1e3:.0f} kB in float32")
        return "\n".join(rows)


def plan(
    model: nn.Module,
    method: str | Method | Iterable[str | Method],
    input_size: int | None = None,
    *,
    num_classes: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batchnorm: str = "frozen",
    example: Example | None = None,
) -> Plan:
    """What ``attach`` with the same arguments would add; the model is not changed.

    Costs are counted on a copy without data (the meta device), so a plan of a large model takes no memory.

    Args:
        model: The backbone.
        method: As for :func:`torchgraft.attach`.
        input_size: Side of the image in pixels; default: the model's own.
        num_classes: Outputs of the adapter's own head; None: no head.
        include: Only these modules, as for ``attach``.
        exclude: Not these modules, as for ``attach``.
        batchnorm: BatchNorm policy, as for ``attach``.
        example: Input ``(args, kwargs)`` of the dry run, as for ``attach``.

    Raises:
        GraftError: Whatever ``attach`` would raise.
    """
    config = resolve(method)
    anatomy = Anatomy(model, example=example, include=include, exclude=exclude, input_size=input_size)
    with torch.device("meta"):
        placed = build(anatomy, config, num_classes=num_classes, batchnorm=batchnorm)
    seen: set[int] = set()
    rows, head = [], 0
    for placement in placed:
        new = [p for p in placement.parameters() if id(p) not in seen]
        seen.update(id(p) for p in new)
        count = sum(p.numel() for p in new)
        if placement.slot == HEAD_SLOT:
            head += count
        elif count:
            layer = own_parameters(anatomy.module(placement.home))
            rows.append(PlannedSite(anatomy.address(placement.home), placement.home, placement.kind, count, layer))
    total = sum(r.parameters for r in rows)
    classifier = anatomy.module(anatomy.head) if anatomy.head else nn.Identity()
    backbone = own_parameters(model) - own_parameters(classifier)
    costs = _costs(model, config, anatomy, num_classes, include, exclude, batchnorm, example)
    from .fingerprint import architecture

    return Plan(
        method=str(config),
        architecture=architecture(model),
        sites=tuple(rows),
        parameters=total,
        head_parameters=head,
        backbone_parameters=backbone,
        input=anatomy.trace.input if anatomy.trace else None,
        flops=costs[0],
        flops_added=costs[1],
        saved_bytes=costs[2],
        file_bytes=4 * (total + head),
    )


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers hold no data."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def saved_bytes(model: nn.Module, example: Example) -> int:
    """Bytes that autograd keeps for the backward of one forward, the model's own tensors excluded.

    Every storage counts once, however many operations keep it. Works on the meta device too.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(*example[0], **example[1])
        count = sum(t.untyped_storage().nbytes() for t in kept.values())
    del out
    return count


def _costs(
    model: nn.Module,
    config: Method,
    anatomy: Anatomy,
    num_classes: int | None,
    include: Any,
    exclude: Any,
    batchnorm: str,
    example: Example | None,
) -> tuple[int | None, int | None, int | None]:
    if anatomy.trace is None or anatomy.trace.input is None:
        return None, None, None
    ghost = meta_copy(model).eval()
    activate(ghost, None)
    try:
        run = (
            _on_meta(example)
            if example
            else next(g for g in guesses(ghost, _side(anatomy.trace.input)) if _first(g).shape == anatomy.trace.input)
        )
        plain = _flops(ghost, run)
        attach(
            ghost,
            config,
            name="plan-of-this-method",
            num_classes=num_classes,
            include=include,
            exclude=exclude,
            batchnorm=batchnorm,
            example=run,
        )
        added = _flops(ghost, run) - plain
        return plain, added, saved_bytes(ghost, run)
    except (RuntimeError, NotImplementedError, TypeError, StopIteration):
        return None, None, None


def _flops(model: nn.Module, example: Example) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*example[0], **example[1])
    return counter.get_total_flops()


def _side(shape: tuple[int, ...]) -> int | None:
    return shape[-1] if len(shape) > 2 else None


def _first(example: Example) -> Tensor:
    return next(iter([*example[0], *example[1].values()]))


def _on_meta(example: Example) -> Example:
    move = lambda v: v.to("meta") if isinstance(v, Tensor) else v  # noqa: E731
    return tuple(move(a) for a in example[0]), {k: move(v) for k, v in example[1].items()}
