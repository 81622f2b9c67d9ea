"""Partial fine-tuning: the end of the network (partial-k of Jia et al., "Visual Prompt Tuning", arXiv 2203.12119).

The last ``k`` units and everything that runs behind them train, as copies of the adapter: the final norm, a last
1 x 1 convolution, the classifier (or the adapter's own head in its place). A unit is, as in that paper's
repository (KMnP/vpt, commit 4410440),

    a block    of a transformer; blocks of a hierarchical one are counted across its stages, and what lies
               between two trained blocks trains too
    a stage    of a ConvNet with several stages (its downsampling included, where the stage holds it)

Parameters: ViT-B/16, k = 1: 7,087,872 + 1,536; ResNet-50, k = 1: 14,964,736. Mergeable: it is the weight. Start:
the pretrained network.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from ..core.anatomy import Anatomy
from ..core.method import Method, register
from ..core.placements import Placement
from ..errors import GraftError
from .forms import copies


@register("partial")
@dataclasses.dataclass(frozen=True)
class Partial(Method):
    """Config of partial fine-tuning.

    Attributes:
        k: How many blocks (transformers) or stages (ConvNets) from the end train.
    """

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise GraftError(f"partial: k={self.k} is not valid; expected at least 1 (the head alone is `linear`)")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A copy of every parameter in the last ``k`` units and behind them."""
        units, word = _units(anatomy)
        if not units:
            raise GraftError(
                f"partial: {type(anatomy.model).__name__} is no series of blocks, so it has no last {self.k}; "
                "use full with include=... to name what trains"
            )
        if self.k > len(units):
            raise GraftError(
                f"partial: k={self.k}, but {type(anatomy.model).__name__} has {len(units)} {word}; "
                f"use k=1 to {len(units)}, or full"
            )
        trained = tuple(prefix for unit in units[-self.k :] for prefix in unit)
        blocks = tuple(f"{b.path}." for b in anatomy.blocks)
        start = max(_done(anatomy, b.removesuffix(".")) for b in blocks if b.startswith(units[-self.k]))

        def chosen(path: str, module: nn.Module, name: str) -> bool:
            behind = not f"{path}.".startswith(blocks) and _done(anatomy, path) > start
            return behind or f"{path}.".startswith(trained)

        return [*copies(anatomy, chosen)]


def _units(anatomy: Anatomy) -> tuple[list[tuple[str, ...]], str]:
    """What ``k`` counts, in order, each as the prefixes of the paths inside it, and the word for it."""
    attention = any(anatomy.inside(b.path, "attn") for b in anatomy.blocks)
    if len(anatomy.stages) > 1 and not attention:
        # A stage whose blocks lie directly in the model has no root of its own.
        return [
            tuple(f"{p}." for p in ([s.root] if s.root else [b.path for b in s.blocks])) for s in anatomy.stages
        ], "stages"
    return [(f"{b.path}.",) for b in anatomy.blocks], "blocks"


def _done(anatomy: Anatomy, path: str) -> int:
    """When the module was done in the dry run (or, not called itself, what holds it); -1: it never ran."""
    if anatomy.trace is None:
        return list(anatomy.modules).index(path) if path else -1
    while path and not anatomy.trace.fired(path):
        path = path.rpartition(".")[0]
    return anatomy.trace.calls[path].order if path else -1
