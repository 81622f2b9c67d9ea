"""Merging: fold what folds into the backbone's own weights, prove it on a probe, and undo it to the bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftError
from .adapter import Adapter, activate, active, adapters, registry_of
from .anatomy import Anatomy
from .comparing import default_probe, is_low, output_for, relative_error, watch
from .folding import CannotFoldError, Fold, fold, folding_order
from .frozen import reference_tensor
from .graft import GraftPoint, existing_point
from .head import HEAD_SLOT
from .placements import Placement
from .probe import Example, in_eval_mode

_WRONG = {False: 1e-3, True: 5e-2}
"""Relative change of one layer's output above which a fold is no rounding but wrong, in float32 and below."""
_TOLERANCE = {False: 1e-4, True: 0.25}
"""Likewise for the model's output. In bfloat16 the *unmerged* model is up to 0.2 away from float32 (small networks of
36 families; the merged one up to 0.16), so there the layers are what is checked."""


@dataclasses.dataclass(frozen=True)
class MergedSite:
    """One placement of a merge report.

    Attributes:
        address: Canonical address of its module.
        kind: Kind of placement.
        merged: Whether it was folded.
        reason: Why not, when it was not.
        error: Largest difference of the module's output, for the input it had on the probe, relative to its
            largest value; None for placements that stay and for modules that are never called.
    """

    address: str
    kind: str
    merged: bool
    reason: str = ""
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What :func:`merge` did; prints as a table.

    Attributes:
        sites: One row per placement.
        error: Largest difference of the model's output on the probe, relative to its largest value; None when
            the model could not be run.
        complete: Whether nothing is left to do at run time but the adapter's head.
        created: Parameters that the backbone did not have (a bias where there was none), by state-dict key.
        plain: Addresses of layers that computed their weight and now run as plain convolutions on the folded one.
            A plain model of the same class would compute a weight again: it cannot load theirs.
    """

    sites: tuple[MergedSite, ...]
    error: float | None
    complete: bool
    created: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        width = max([len("site"), *(len(s.address) for s in self.sites)])
        rows = [f"{'site':<{width}}  {'kind':<9}  merged"]
        for s in self.sites:
            error = "" if s.error is None else f"  error {s.error:.1e}"
            plain = "  as a plain convolution" if s.address in self.plain else ""
            what = f"yes{error}{plain}" if s.merged else f"no: {s.reason}"
            rows.append(f"{s.address:<{width}}  {s.kind:<9}  {what}")
        if self.created:
            rows.append(f"new parameters: {', '.join(self.created)}")
        rows.append(f"output error on the probe: {'not measured' if self.error is None else f'{self.error:.1e}'}")
        return "\n".join(rows)


@dataclasses.dataclass
class _Undo:
    """What :func:`unmerge` needs: what was folded, and the actions that were taken out."""

    name: str
    folds: list[Fold] = dataclasses.field(default_factory=list)
    actions: list[tuple[GraftPoint, list[tuple[str, Any]]]] = dataclasses.field(default_factory=list)

    def restore(self) -> None:
        """Bring everything back."""
        for done in reversed(self.folds):
            done.undo()
        for point, actions in self.actions:
            point.actions[self.name] = actions


def merge(
    model: nn.Module, name: str | None = None, *, probe: Example | Tensor | None = None, tolerance: float | None = None
) -> MergeReport:
    """Fold an adapter into the backbone's weights, as far as it folds.

    Sums are made in float32. Every layer is then compared with itself on what it got from the probe, and the
    model's output with that of before. What cannot fold keeps acting, and the report says why. The adapter stays
    attached and :func:`unmerge` brings back the very bits; until then no other adapter can be activated.

    Args:
        model: A model with adapters.
        name: Which one; default: the active one.
        probe: Input on which the merged model is compared with the unmerged one; default: random values of the
            shape of the dry run.
        tolerance: Largest relative difference of the output that is accepted; default: 1e-4 in float32, and 0.25
            in lower precision, where rounding alone may change it by as much.

    Raises:
        GraftError: Nothing is attached, something is merged already, the weights have no values, or the
            difference is above the tolerance; the model is unchanged then.
    """
    model = _uncompiled(model)
    adapter = _chosen(model, name)
    registry, was_active = registry_of(model), active(model)
    if registry.merged is not None:
        raise GraftError(f"adapter {registry.merged.name!r} is merged already; unmerge first")
    if "_torchgraft_router" in model.__dict__:
        raise GraftError(f"merging {adapter.name!r} inside route(): leave its `with` block first")
    if any(p.is_meta for p in model.parameters()):
        raise GraftError(f"merging {adapter.name!r}: the weights are on the meta device and have no values; load them")
    activate(model, adapter.name)
    undo = _Undo(adapter.name)
    try:
        anatomy = Anatomy(model, example=adapter.example)
        report, limit = _merged(model, adapter, anatomy, default_probe(probe, anatomy), undo, tolerance)
        if report.error is not None and not report.error <= limit:
            raise GraftError(
                f"merging {adapter.name!r} changes the output by {report.error:.1e} (relative), more than the "
                f"tolerance {limit:.1e}; the model is unchanged. Use it unmerged, merge in float32, or pass a larger "
                "tolerance="
            )
    except BaseException:
        undo.restore()
        registry.merged = None
        activate(model, was_active)
        raise
    return report


def unmerge(model: nn.Module) -> None:
    """Bring back every parameter, bit for bit, and let the adapter act at run time again.

    Raises:
        GraftError: Nothing is merged.
    """
    model = _uncompiled(model)
    registry = registry_of(model) if adapters(model) else None
    if registry is None or registry.merged is None:
        raise GraftError("nothing is merged into this model")
    undo: _Undo = registry.merged
    undo.restore()
    registry.merged = None
    activate(model, undo.name)


# -- the steps ---------------------------------------------------------------------------------------------


def _merged(
    model: nn.Module,
    adapter: Adapter,
    anatomy: Anatomy,
    example: Example | None,
    undo: _Undo,
    tolerance: float | None,
) -> tuple[MergeReport, float]:
    """Fold, and say what was done and how large an error is accepted; ``undo`` is filled on the way."""
    homes: dict[int, tuple[str, nn.Module]] = {}
    for _, placement in adapter.placements:  # a module that stands at several paths is folded once
        homes.setdefault(id(anatomy.module(placement.home)), (placement.home, anatomy.module(placement.home)))
    errors: dict[str, float | None] = {}
    stays: dict[Placement, str] = {}
    created, plain = [], []
    with torch.no_grad(), in_eval_mode(model):
        before, inputs = watch(model, dict(homes.values()), example)
        activate(model, None)
        for path, module in homes.values():
            point = existing_point(module)
            assert point is not None
            order, reasons = folding_order(module, point, adapter.name)
            stays |= {p: r for p, r in reasons.items() if p not in stays or p.home == path}
            if not order:
                continue
            done = _fold(module, point, order, inputs.get(path), undo, reference_tensor(model).dtype)
            if isinstance(done, str):
                stays |= dict.fromkeys(order, done)
                continue
            fold_, errors[path] = done
            created += [f"{path}.{n}" if path else n for n in fold_.created()]
            plain += [anatomy.address(path)] if fold_.plain else []
        registry_of(model).merged = undo
        activate(model, adapter.name)
        after, _ = watch(model, {}, example)
    rows = []
    for _, placement in adapter.placements:
        address, reason = anatomy.address(placement.home), stays.get(placement, "")
        error = None if reason else errors.get(placement.home)
        rows.append(MergedSite(address, placement.kind, not reason, reason, error))
    slots = [p.slot for _, p in adapter.placements]
    complete = all(row.merged or slot == HEAD_SLOT for row, slot in zip(rows, slots, strict=True))
    # Detectors return as many boxes as they find: two numbers of them cannot be compared.
    unlike = before is None or after is None or before.shape != after.shape
    error = None if unlike else relative_error(after, before)  # type: ignore[arg-type]
    limit = tolerance if tolerance is not None else _TOLERANCE[is_low(before)]
    return MergeReport(tuple(rows), error, complete, tuple(created), tuple(plain)), limit


def _fold(
    module: nn.Module,
    point: GraftPoint,
    order: list[Placement],
    inputs: Example | None,
    undo: _Undo,
    like: torch.dtype,
) -> tuple[Fold, float | None] | str:
    """Fold into one module and take the actions out, when its output for the same input stays; else why not."""
    actions = point.actions[undo.name]
    folding = set(order)
    wanted = None
    if inputs is not None:
        point.actions[undo.name] = [(when, action) for when, action in actions if action in folding]
        try:
            point.select(undo.name)
            wanted = output_for(module, inputs)
        finally:
            point.select(None)
            point.actions[undo.name] = actions
    try:
        done = fold(module, order, like)
    except CannotFoldError as obstacle:
        return str(obstacle)
    undo.folds.append(done)
    error = None if wanted is None or inputs is None else relative_error(output_for(module, inputs), wanted)
    if wanted is not None and error is not None and not error <= _WRONG[is_low(wanted)]:
        undo.folds.pop().undo()
        return f"folded, it changes the layer's output by {error:.1e}: the layer does not use its weight plainly"
    undo.actions.append((point, actions))
    point.actions[undo.name] = [(when, action) for when, action in actions if action not in folding]
    return done, error


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that ``torch.compile`` makes."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return model if inner is None else inner


def _chosen(model: nn.Module, name: str | None) -> Adapter:
    known = adapters(model)
    if not known:
        raise GraftError("nothing is attached to this model; attach or load an adapter first")
    wanted = name or active(model)
    if wanted is None or wanted not in known:
        raise GraftError(f"the model has no adapter {wanted!r}; name one of {', '.join(known)}")
    return known[wanted]
