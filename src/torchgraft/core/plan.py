"""Plans: what a method would add to a model, before anything is attached."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .adapter import adapters, attach, detach
from .anatomy import Anatomy
from .build import build, check
from .frozen import own_parameters, reference_tensor
from .head import HEAD_SLOT
from .method import Method
from .method import method as resolve
from .placements import BatchStats, Placement, Train
from .probe import Example


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
        saved_bytes: Bytes that autograd keeps for the backward of one input on the CPU, in eval mode and by the
            plain path; None when unknown. Other devices choose other kernels, which keep a little more or less.
        file_bytes: Bytes of the tensors in the adapter's file: parameters, head and statistics, shared ones
            once, in the types that they are saved in by default.
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
        rows.append(f"adapter file: {self.file_bytes / 1e3:.0f} kB")
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
    """What ``attach`` with the same arguments would add to the plain backbone; the model is not changed.

    Whatever adapters the model has are left out and stay as they are, as do its modes and torch's random
    numbers. Costs are counted on copies without data, so a plan of a large model takes no memory.

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
    plain = _without_adapters(model)
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(i for i in devices if i is not None)):
        anatomy = Anatomy(plain, example=example, include=include, exclude=exclude, input_size=input_size)
        with torch.device("meta"):
            placed = build(anatomy, config, num_classes=num_classes, batchnorm=batchnorm)
        check(anatomy, config, placed)
        options = {"num_classes": num_classes, "include": include, "exclude": exclude, "batchnorm": batchnorm}
        flops, flops_added, kept = _costs(anatomy, config, options)
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
    classifier = anatomy.module(anatomy.head) if anatomy.head else nn.Identity()
    from .fingerprint import architecture

    return Plan(
        method=str(config),
        architecture=architecture(plain),
        sites=tuple(rows),
        parameters=sum(r.parameters for r in rows),
        head_parameters=head,
        backbone_parameters=own_parameters(plain) - own_parameters(classifier),
        input=anatomy.trace.input if anatomy.trace else None,
        flops=flops,
        flops_added=flops_added,
        saved_bytes=kept,
        file_bytes=_file_bytes(placed, reference_tensor(plain).dtype),
    )


def saved_bytes(model: nn.Module, example: Example) -> int:
    """Bytes that autograd keeps for the backward of one forward, the model's own tensors excluded.

    Every storage counts once, however many operations keep it. Works on the meta device and on fake tensors
    too. What is kept depends on the kernels that the device chooses: in inference mode the CPU's BatchNorm keeps
    no statistics and its fused attention no scores, where the meta device's keep both.
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


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model itself, or, when it has adapters, a copy without them that reads the same memory."""
    if not adapters(model):
        return model
    plain = _ghost(model, lambda tensor: tensor)
    detach(plain)
    return plain


def _costs(anatomy: Anatomy, config: Method, options: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Operations, added operations and bytes kept; None where the model cannot run without data."""
    if anatomy.trace is None or anatomy.trace.input is None:
        return None, None, None
    try:
        ghost = _ghost(anatomy.model, _on_meta).eval()
        run = _mapped(anatomy.trace.example, _on_meta)
        flops = _flops(ghost, run)
        attach(ghost, config, example=run, lean=False, **options)
        added = _flops(ghost, run) - flops
        # Fake tensors say that they are on the CPU, so the kernels (and what they keep) are those of the CPU.
        fakes = FakeTensorMode(allow_non_fake_inputs=True)

        def on_cpu(tensor: Tensor) -> Tensor:
            with fakes:
                return _empty(tensor, "cpu")

        ghost, run = _ghost(ghost, on_cpu), _mapped(run, on_cpu)
        with fakes:
            kept = saved_bytes(ghost, run)
        return flops, added, kept
    except (RuntimeError, NotImplementedError, TypeError, StopIteration):
        return None, None, None


def _ghost(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy whose parameters and buffers are what ``make`` makes of the model's."""
    memo: dict[int, Any] = {id(p): nn.Parameter(make(p.detach()), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): make(b) for b in model.buffers()})


def _mapped(example: Example, make: Callable[[Tensor], Tensor]) -> Example:
    args, kwargs = tree_map_only(Tensor, make, example)
    return args, kwargs


def _on_meta(tensor: Tensor) -> Tensor:
    return _empty(tensor, "meta")


def _empty(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _flops(model: nn.Module, example: Example) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*example[0], **example[1])
    return counter.get_total_flops()


def _file_bytes(placed: list[Placement], dtype: torch.dtype) -> int:
    """Bytes of everything that the placements own; new forms take the backbone's type when they are attached."""
    sizes: dict[int, int] = {}
    for placement in placed:
        copies = isinstance(placement, (Train, BatchStats))
        for tensor in placement.owned().values():
            kept = copies or not tensor.is_floating_point()
            sizes[id(tensor)] = tensor.numel() * (tensor.dtype if kept else dtype).itemsize
    return sum(sizes.values())
