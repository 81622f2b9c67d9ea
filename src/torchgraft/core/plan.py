"""Plans: what a method would add to a model, before anything is attached."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import GraftError
from ..lean import meter
from ..lean.install import level_of
from .adapter import adapters, attach, detach
from .anatomy import Anatomy
from .build import build, check
from .frozen import own_parameters, reference_tensor
from .ghosts import copied, on_meta, without_data
from .head import HEAD_SLOT
from .kept import NEEDS_DATA, Kept
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
        batch: Rows of the batch that the bytes below are for.
        lean: The level that was asked for; ``"off"`` for none.
        file_bytes: Bytes of the tensors in the adapter's file: parameters, head and statistics, shared ones
            once, in the types that they are saved in by default.
        kept: Counts the bytes of a training step, when they are first asked for; None when unknown.
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
    batch: int
    lean: str
    file_bytes: int
    kept: Kept | None = dataclasses.field(repr=False, compare=False)

    @property
    def percent(self) -> float:
        """Trainable values without the head in per cent of the backbone's."""
        return 100 * self.parameters / max(self.backbone_parameters, 1)

    @property
    def saved_bytes(self) -> int | None:
        """Bytes that autograd keeps for the backward of a training step at level ``lean``; None when unknown.

        Parameters and input do not count. The bytes are those of the CPU; other devices choose other kernels, which
        keep a little more or less.
        """
        return None if self.kept is None else self.kept.at(self.lean)

    @property
    def saved(self) -> dict[str, int]:
        """Likewise at every level, by its name, with ``"off"`` for none; empty when unknown."""
        return {} if self.kept is None else self.kept.by_level()

    @property
    def saved_full(self) -> int | None:
        """Likewise for full fine-tuning of the plain backbone, its BatchNorms in training mode."""
        return None if self.kept is None else self.kept.in_full()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        fields = dataclasses.asdict(dataclasses.replace(self, kept=None))
        del fields["kept"]
        counted = {name: getattr(self, name) for name in ("percent", "saved_bytes", "saved", "saved_full")}
        return fields | counted

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
        if self.kept is not None and self.saved_bytes is not None:
            rows.append(self._saved(self.kept))
        rows.append(f"adapter file: {self.file_bytes / 1e3:.0f} kB")
        return "\n".join(rows)

    def _saved(self, kept: Kept) -> str:
        """The level that was asked for beside none and full fine-tuning."""
        shown = {f"lean {level}": kept.at(level) for level in (self.lean, "off")}
        shown["full fine-tuning"] = kept.in_full()
        found = [f"{size / 2**20:.1f} MiB ({name})" for name, size in shown.items() if size is not None]
        return f"kept for the backward, batch of {self.batch}: {', '.join(found)}"


def plan(
    model: nn.Module,
    method: str | Method | Iterable[str | Method],
    input_size: int | None = None,
    *,
    num_classes: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batchnorm: str = "frozen",
    lean: bool | str = True,
    fold: bool = True,
    batch: int = 1,
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
        lean: Level that the plan shows first, as for ``attach``; all of them are counted.
        fold: Whether norms are folded, as for ``attach``.
        batch: Size of the batch that the saved bytes are for; an ``example`` is repeated so many times.
        example: Input ``(args, kwargs)`` of the dry run, as for ``attach``.

    Raises:
        GraftError: Whatever ``attach`` would raise, or ``batch`` is no positive number.
    """
    config, level = resolve(method), level_of(lean) or "off"
    if not isinstance(batch, int) or batch < 1:
        raise GraftError(f"plan: batch={batch!r} was given, expected a whole number of at least 1")
    plain = _without_adapters(model)
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(i for i in devices if i is not None)):
        anatomy = Anatomy(plain, example=example, include=include, exclude=exclude, input_size=input_size)
        with torch.device("meta"):
            placed = build(anatomy, config, num_classes=num_classes, batchnorm=batchnorm)
        check(anatomy, config, placed)
        options = {"num_classes": num_classes, "include": include, "exclude": exclude, "batchnorm": batchnorm}
        costs = _costs(anatomy, config, options | {"fold": fold}, batch)
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
        flops=costs.flops,
        flops_added=costs.flops_added,
        batch=batch * (anatomy.trace.input[0] if anatomy.trace and anatomy.trace.input else 1),
        lean=level,
        file_bytes=_file_bytes(placed, reference_tensor(plain).dtype),
        kept=costs.kept,
    )


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model itself, or, when it has adapters, a copy without them that reads the same memory."""
    if not adapters(model):
        return model
    plain = copied(model, lambda tensor: tensor)
    detach(plain)
    return plain


@dataclasses.dataclass
class _Costs:
    """Operations and bytes; None where the model cannot run without data."""

    flops: int | None = None
    flops_added: int | None = None
    kept: Kept | None = None


def _costs(anatomy: Anatomy, config: Method, options: dict[str, Any], batch: int) -> _Costs:
    """What a forward and a training step with the method cost, counted on copies without data."""
    if anatomy.trace is None or anatomy.trace.input is None:
        return _Costs()
    try:
        ghost, run = without_data(anatomy.model, anatomy.trace.example, on_meta)
        ghost.eval()
        flops = _flops(ghost, run)
        attach(ghost, config, example=run, lean=False, **options)
        return _Costs(flops, _flops(ghost, run) - flops, Kept(ghost, run, batch))
    except NEEDS_DATA:
        return _Costs()


def _flops(model: nn.Module, example: Example) -> int:
    return meter.flops(lambda: torch.no_grad()(model)(*example[0], **example[1]))


def _file_bytes(placed: list[Placement], dtype: torch.dtype) -> int:
    """Bytes of everything that the placements own; new forms take the backbone's type when they are attached."""
    sizes: dict[int, int] = {}
    for placement in placed:
        copies = isinstance(placement, (Train, BatchStats))
        for tensor in placement.owned().values():
            kept = copies or not tensor.is_floating_point()
            sizes[id(tensor)] = tensor.numel() * (tensor.dtype if kept else dtype).itemsize
    return sum(sizes.values())
