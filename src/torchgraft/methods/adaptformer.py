"""AdaptFormer (Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition").

arXiv 2205.13535, NeurIPS 2022. A bottleneck beside every MLP, on the residual stream x in front of the norm:

    x <- x + MLP(LN x) + s * (relu(x W_d + b_d) W_u + b_u)

with r = ``width`` and s = ``scale`` (0.1). It is added outside LayerScale and DropPath; there is dropout behind the
ReLU.

Shapes: (..., d) -> (..., d). Parameters per block: ``2 r d + r + d``; ViT-B/16, r = 8: 156,768 (0.16 M in the table
of arXiv 2207.07039). Not mergeable: it runs beside a non-linear MLP. Start: W_u = 0, as published, so the pretrained
network.
"""

from __future__ import annotations

import dataclasses

from ..core.anatomy import Anatomy
from ..core.method import Method, register
from ..core.placements import Placement
from .forms.adapter_layer import AdapterLayer, NormSide
from .forms.branch_adapters import AdapterInput, adapted_branches, beside, check_options


@register("adaptformer")
@dataclasses.dataclass(frozen=True)
class AdaptFormer(Method):
    """Config of AdaptFormer.

    Attributes:
        width: r.
        scale: s.
        dropout: Behind the ReLU, in training.
        adapter_input: The residual stream in front of the MLP's norm (``"pre_norm"``, as published) or behind it.
        layer_norm: A LayerNorm of the adapter: in front, behind, or none, as published.
    """

    width: int = 8
    scale: float = 0.1
    dropout: float = 0.1
    adapter_input: AdapterInput = "pre_norm"
    layer_norm: NormSide = "none"

    def __post_init__(self) -> None:
        check_options(self.name, width=self.width)

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One bottleneck beside every MLP."""
        found = adapted_branches(anatomy, self.name, ["mlp"])
        return [beside(anatomy, branch, self._layer, self.adapter_input) for branch in found]

    def _layer(self, d: int, out: int, axis: int) -> AdapterLayer:
        return AdapterLayer(
            d,
            self.width,
            out=out,
            layer_norm=self.layer_norm,
            scale=self.scale,
            dropout=self.dropout,
            init="lora",
            axis=axis,
        )
