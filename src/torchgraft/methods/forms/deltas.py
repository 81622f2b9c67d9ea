"""Methods that change weights by a scaled delta of some rank: which weights, with which rank and scale."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.method import Method
from ...core.placements import Placement, WeightDelta
from ...errors import GraftError
from .targets import Part, Weight, matching, nothing_found, weights


@dataclasses.dataclass(frozen=True)
class Deltas(Method):
    """The options that LoRA, LoKr and LoHa share.

    Attributes:
        rank: Rank r.
        alpha: The delta is multiplied by alpha / rank.
        targets: Which weights: ``auto`` or one or several parts (:func:`torchgraft.methods.forms.targets.weights`).
        rank_pattern: (module, rank) pairs for modules whose rank is another: paths, globs or addresses, as for
            ``include``; the first that fits counts.
        alpha_pattern: (module, alpha) pairs, likewise.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: Part | tuple[Part, ...] = "auto"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        for rank in (self.rank, *(r for _, r in self.rank_pattern)):
            if rank < 1:
                raise GraftError(f"{self.name}: rank={rank} is not valid; expected a whole number of at least 1")

    def form(self, layer: nn.Module, weight: Tensor, rank: int, scale: float) -> nn.Module:
        """The delta of one weight (or of its rows) of ``layer``."""
        raise TypeError(f"{type(self).__name__} defines no form")

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of the delta."""
        return alpha / rank

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One delta per weight."""
        found = weights(anatomy, self.targets, self.name)
        if not found:
            raise nothing_found(anatomy, self.targets, self.name)
        ranks = [(matching(anatomy, [pattern]), rank) for pattern, rank in self.rank_pattern]
        alphas = [(matching(anatomy, [pattern]), alpha) for pattern, alpha in self.alpha_pattern]
        placed: list[Placement] = []
        for weight in found:
            rank = next((r for paths, r in ranks if weight.path in paths), self.rank)
            alpha = next((a for paths, a in alphas if weight.path in paths), self.alpha)
            placed.append(self.placed(anatomy, weight, rank, self.scale(rank, alpha)))
        return placed

    def placed(self, anatomy: Anatomy, weight: Weight, rank: int, scale: float) -> WeightDelta:
        """The delta at its layer: beside it where that is possible, else on the weight."""
        layer = anatomy.module(weight.path)
        form = self.form(layer, weight.value(anatomy), rank, scale)
        return weight.delta(anatomy, form)
