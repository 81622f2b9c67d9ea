"""Merging: fold what folds into the backbone's own weights, prove it on a probe, and undo it to the bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftError
from .adapter import Adapter, activate, active, adapters, registry_of
from .anatomy import Anatomy
from .graft import existing_point, first_output
from .head import HEAD_SLOT
from .placements import Placement
from .probe import Example, in_eval_mode, leading_tensor


@dataclasses.dataclass(frozen=True)
class MergedSite:
    """One placement of a merge report.

    Attributes:
        address: Canonical address of its module.
        kind: Kind of placement.
        merged: Whether it was folded.
        reason: Why not, when it was not.
        error: Largest difference of the module's output on the probe, relative to its largest value; None
            for placements that stay and for modules that are never called.
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
    """

    sites: tuple[MergedSite, ...]
    error: float | None
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        width = max([len("site"), *(len(s.address) for s in self.sites)])
        rows = [f"{'site':<{width}}  {'kind':<9}  merged"]
        for s in self.sites:
            what = (
                ("yes" + (f"  error {s.error:.1e}" if s.error is not None else "")) if s.merged else f"no: {s.reason}"
            )
            rows.append(f"{s.address:<{width}}  {s.kind:<9}  {what}")
        rows.append(f"output error on the probe: {'not measured' if self.error is None else f'{self.error:.1e}'}")
        return "\n".join(rows)


@dataclasses.dataclass
class _Undo:
    """What :func:`unmerge` needs: the very parameters, and the actions that were taken out."""

    name: str
    parameters: list[tuple[nn.Module, str, nn.Parameter | None]]
    actions: list[tuple[nn.Module, list[tuple[str, Any]]]]


def merge(
    model: nn.Module, name: str | None = None, *, probe: Example | Tensor | None = None, tolerance: float | None = None
) -> MergeReport:
    """Fold an adapter into the backbone's weights, as far as it folds.

    Sums are made in float32. What cannot fold keeps acting, and the report says why. The adapter stays attached
    and :func:`unmerge` brings back the very bits; until then no other adapter can be activated.

    Args:
        model: A model with adapters.
        name: Which one; default: the active one.
        probe: Input on which the merged model is compared with the unmerged one; default: random values of the
            shape of the dry run.
        tolerance: Largest relative difference of the output that is accepted; default: 1e-4 in float32, 2e-2 in
            lower precision.

    Raises:
        GraftError: Nothing is attached, something is merged already, or the difference is above the tolerance;
            the model is unchanged then.
    """
    adapter = _chosen(model, name)
    registry = registry_of(model)
    if registry.merged is not None:
        raise GraftError(f"adapter {registry.merged.name!r} is merged already; unmerge first")
    if active(model) != adapter.name:
        activate(model, adapter.name)
    anatomy = Anatomy(model)
    example = _probe(probe, anatomy)
    folding = [p for _, p in adapter.placements if p.supports_here(anatomy.module(p.home)).merge and _folds(p)]
    undo = _Undo(adapter.name, [], [])
    with torch.no_grad(), in_eval_mode(model):
        before, seen = _watch(model, anatomy, example, {p.home for p in folding})
        for placement in folding:
            _fold(anatomy.module(placement.home), placement, undo)
        for home in {p.home for p in folding}:
            _drop_actions(anatomy.module(home), adapter.name, {p for p in folding if p.home == home}, undo)
        registry.merged = undo
        activate(model, adapter.name)
        after, again = _watch(model, anatomy, example, set(seen))
    error = None if before is None or after is None else _relative(after, before)
    limit = tolerance if tolerance is not None else _default_tolerance(before)
    if error is not None and not error <= limit:
        unmerge(model)
        raise GraftError(
            f"merging {adapter.name!r} changes the output by {error:.1e} (relative), more than the tolerance "
            f"{limit:.1e}; the model is unchanged. Use it unmerged, merge in float32, or pass a larger tolerance="
        )
    rows = []
    for _, placement in adapter.placements:
        support = placement.supports_here(anatomy.module(placement.home))
        done = placement in folding
        known = done and placement.home in seen and placement.home in again
        rows.append(
            MergedSite(
                anatomy.address(placement.home),
                placement.kind,
                done,
                "" if done else support.reason or "it has no folded form",
                _relative(again[placement.home], seen[placement.home]) if known else None,
            )
        )
    left = [r for r, (_, p) in zip(rows, adapter.placements, strict=True) if not r.merged and p.slot != HEAD_SLOT]
    return MergeReport(tuple(rows), error, not left)


def unmerge(model: nn.Module) -> None:
    """Bring back every parameter, bit for bit, and let the adapter act at run time again.

    Raises:
        GraftError: Nothing is merged.
    """
    registry = registry_of(model)
    undo = registry.merged
    if undo is None:
        raise GraftError("nothing is merged into this model")
    for module, name, parameter in reversed(undo.parameters):
        module._parameters[name] = parameter
    for module, actions in undo.actions:
        point = existing_point(module)
        assert point is not None
        point.actions[undo.name] = actions
    registry.merged = None
    activate(model, undo.name)


def _chosen(model: nn.Module, name: str | None) -> Adapter:
    known = adapters(model)
    if not known:
        raise GraftError("nothing is attached to this model; attach or load an adapter first")
    wanted = name or active(model)
    if wanted is None or wanted not in known:
        raise GraftError(f"the model has no adapter {wanted!r}; name one of {', '.join(known)}")
    return known[wanted]


def _folds(placement: Placement) -> bool:
    return hasattr(placement, "folded")


def _fold(module: nn.Module, placement: Any, undo: _Undo) -> None:
    """Give the module new parameters; the old ones stay as they are, for others that share them and for undoing."""
    for name, value in placement.folded(module).items():
        old = module._parameters.get(name)
        undo.parameters.append((module, name, old))
        like = old if old is not None else next(p for p in module._parameters.values() if p is not None)
        module._parameters[name] = nn.Parameter(value.to(like.dtype), requires_grad=False)


def _drop_actions(module: nn.Module, name: str, folded: set[Any], undo: _Undo) -> None:
    point = existing_point(module)
    assert point is not None
    undo.actions.append((module, point.actions[name]))
    point.actions[name] = [(when, action) for when, action in point.actions[name] if action not in folded]


def _watch(
    model: nn.Module, anatomy: Anatomy, example: Example | None, homes: set[str]
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The model's output and the outputs of the modules at ``homes``, for the probe."""
    if example is None:
        return None, {}
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def look(module: nn.Module, args: Any, out: Any) -> None:
            if path not in seen:
                seen[path] = first_output(out).detach().clone()

        return look

    handles = [anatomy.module(h).register_forward_hook(keep(h)) for h in homes if h]
    try:
        out = model(*example[0], **example[1])
    finally:
        for handle in handles:
            handle.remove()
    return leading_tensor(out), seen


def _probe(probe: Example | Tensor | None, anatomy: Anatomy) -> Example | None:
    if isinstance(probe, Tensor):
        return (probe,), {}
    if probe is not None or anatomy.trace is None:
        return probe
    generator = torch.Generator().manual_seed(0)

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    args, kwargs = anatomy.trace.example
    return tuple(fresh(a) for a in args), {k: fresh(v) for k, v in kwargs.items()}


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))


def _default_tolerance(out: Tensor | None) -> float:
    return 1e-4 if out is None or out.dtype in (torch.float32, torch.float64) else 2e-2
