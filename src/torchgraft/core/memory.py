"""Lean layers in an adapted model: where they go, and which stand aside for the active adapter."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..lean.fold import Pair, fold_norms, folding_always, pause_fold
from ..lean.install import make_lean, make_plain, pause
from .blocks import inner_modules
from .frozen import reference_tensor
from .graft import GraftPoint, existing_point
from .placements import Placement
from .probe import Example, in_eval_mode

if TYPE_CHECKING:
    from .anatomy import Anatomy

_BESIDE_THE_WEIGHT = {"bias", "running_mean", "running_var", "num_batches_tracked"}
"""What a lean layer may find changed: none of it is read together with the layer's input in the backward."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What lean needs to know of a model, found once.

    Attributes:
        mlps: Paths of the MLPs of transformer blocks.
        blocks: Paths of the blocks.
        pairs: (convolution, BatchNorm that reads nothing but its output), by path.
    """

    mlps: tuple[str, ...]
    blocks: tuple[str, ...]
    pairs: tuple[Pair, ...]


NO_PARTS = Parts((), (), ())


def parts_of(anatomy: Anatomy) -> Parts:
    """The parts of the plain model that ``anatomy`` describes."""
    if anatomy.trace is None:
        return NO_PARTS
    blocks = [b.path for b in anatomy.blocks if anatomy.trace.fired(b.path)]
    mlps = [s.path for b in blocks for s in anatomy.inside(b, "mlp") if anatomy.trace.fired(s.path)]
    pairs = _verified(anatomy.model, anatomy.trace.pairs, anatomy.trace.example)
    return Parts(tuple(dict.fromkeys(mlps)), tuple(blocks), pairs)


def settle_memory(
    model: nn.Module, level: str | None, parts: Parts, placements: list[Placement], *, fold: bool
) -> None:
    """Give ``model`` the lean layers of ``level`` (None: none) and, with ``fold``, folded norms.

    Args:
        model: The adapted model.
        level: A name of :data:`torchgraft.lean.LEVELS`.
        parts: What was found at the plain model.
        placements: The placements of the adapter for which the layers are settled.
        fold: Whether norms are computed in the weight of the convolution before them.
    """
    make_plain(model)
    points = {m: point for m in model.modules() if (point := existing_point(m)) is not None}
    for point in points.values():
        point.lean = level is not None
    fold_norms(model, parts.pairs if fold else ())
    if level is None:
        return
    again = {"recompute": parts.mlps, "checkpoint": parts.blocks}.get(level, ())
    closed = [model.get_submodule(p) for p in again if _is_closed(p, placements)]
    make_lean(
        model,
        [m for _, m in inner_modules(model)],
        list(points),
        again=closed,
        products=level == "recompute",
        compact=level == "compact",
    )


def stand_aside(module: nn.Module, point: GraftPoint, routed: bool = False) -> None:
    """Let the lean layer at an adapted module run as it is where the active adapter changes or trains its weight.

    Args:
        module: The module.
        point: Its graft point, with the actions of the active adapter.
        routed: Whether any of the adapters may act.
    """
    if routed:
        lists = [when for actions in point.actions.values() for when, _ in actions]
        changed = {when[5:] for when in lists if when.startswith("view:")}
        before, after = "before" in lists or "around" in lists, "after" in lists or "around" in lists
    else:
        changed = set(point.views)
        before, after = bool(point.before or point.around), bool(point.after or point.around)
    pause(module, bool(changed - _BESIDE_THE_WEIGHT))
    pause_fold(module, before=before or bool(changed), after=after or bool(changed))


def plain_again(module: nn.Module) -> None:
    """No adapter acts at ``module`` any more."""
    pause(module, False)
    pause_fold(module, before=False, after=False)


def _verified(model: nn.Module, pairs: tuple[Pair, ...], example: Example) -> tuple[Pair, ...]:
    """The pairs that may be folded: a model may read the output of a convolution in more places than its norm."""
    like = reference_tensor(model)
    if not pairs or like.is_meta or isinstance(like, FakeTensor):
        return pairs
    generator = torch.Generator().manual_seed(0)

    def drawn(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t

    args, kwargs = tree_map_only(Tensor, drawn, example)

    def outputs(chosen: tuple[Pair, ...]) -> list[Tensor]:
        fold_norms(model, chosen)
        found = model(*args, **kwargs)
        return [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]

    with in_eval_mode(model), torch.no_grad(), folding_always():
        plain = outputs(())

        def same(chosen: tuple[Pair, ...]) -> bool:
            return all(_close(a, b) for a, b in zip(plain, outputs(chosen), strict=True))

        kept = pairs if same(pairs) else tuple(p for p in pairs if same((p,)))
        fold_norms(model, ())
    return kept


def _close(a: Tensor, b: Tensor) -> bool:
    allowed = 1e-4 if a.dtype.itemsize >= 4 else 0.1
    return float((a.float() - b.float()).abs().amax()) <= allowed * float(a.float().abs().amax()) + 1e-12


def _is_closed(path: str, placements: list[Placement]) -> bool:
    """Whether no placement acts partly inside the module at ``path`` and partly outside: it may run twice."""
    for placement in placements:
        inside = {hook.path.startswith(path + ".") for hook in placement.hooks()}
        if len(inside) > 1:
            return False
    return True
