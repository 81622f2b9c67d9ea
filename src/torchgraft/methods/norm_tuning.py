"""Norm tuning: the scale and shift of every normalisation layer.

    y = g * (x - mean) / sqrt(var + eps) + b        g, b of every norm train, as copies of the adapter

Chosen by the type of the layer (BatchNorm, LayerNorm, GroupNorm and what other libraries derive from them), not
by a piece of its name: the published Conv-Adapter code (commit 97e1fc8), which looks for ``bn``, ``gn`` and
``norm`` in names, misses the norms in a ResNet's shortcuts and in a ConvNeXt's stem and downsampling.

Parameters: 2 per channel of every norm; 4 d per block of a transformer of width d. ResNet-50 53,120, ConvNeXt-T
16,320, ViT-B/16 38,400. Mergeable: it is the affine part. Start: the pretrained network.
"""

from __future__ import annotations

import dataclasses

from ..core.anatomy import Anatomy
from ..core.layers import is_norm
from ..core.method import Method, register
from ..core.placements import Placement
from ..errors import GraftError
from .forms import copies


@register("norm-tuning")
@dataclasses.dataclass(frozen=True)
class NormTuning(Method):
    """Config of norm tuning; it has no options (``include`` and ``exclude`` narrow it)."""

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A copy of every scale and shift."""
        placed = copies(anatomy, lambda path, module, name: is_norm(module))
        if not placed:
            raise GraftError(
                f"norm-tuning: no BatchNorm, LayerNorm or GroupNorm with a scale or shift is selected on "
                f"{type(anatomy.model).__name__}; use another method or another selection"
            )
        return [*placed]
