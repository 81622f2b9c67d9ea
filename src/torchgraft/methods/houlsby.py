"""Houlsby adapters (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, ICML 2019).

Two bottlenecks per block, behind attention and behind the MLP, before the residual sum (r = ``width``):

    a <- a + f(a W_d + b_d) W_u + b_u        a: what the output projection of attention returns
    m <- m + f(m W_d + b_d) W_u + b_u        m: what fc2 returns

Both act before dropout, LayerScale and DropPath, and in post-norm blocks before the norm of the sum. Cross-attention
counts as attention. The code of arXiv 2110.04366 puts a LayerNorm in front of the attention adapters:
``attn_layer_norm="in"``.

Shapes: (..., d) -> (..., d), on tokens, windows and maps. Parameters per bottleneck: ``2 r d + r + d``; ViT-B/16,
r = 8: 313,536. Not mergeable: an activation stands between the two layers. Start: W_u = 0, so the pretrained
network (the paper's is N(0, 0.01), near to it; ``init="bert"`` is N(0, 0.02) as in arXiv 2110.04366).
"""

from __future__ import annotations

import dataclasses
import functools

from ..core.anatomy import Anatomy
from ..core.method import Method, register
from ..core.placements import Placement
from .forms.adapter_layer import AdapterLayer, NormSide, Start
from .forms.branch_adapters import Sublayer, adapted_branches, behind, check_options


@register("houlsby")
@dataclasses.dataclass(frozen=True)
class Houlsby(Method):
    """Config of the adapters of Houlsby et al.

    Attributes:
        width: r.
        sites: Behind which sub-layers.
        act: f.
        dropout: Behind f, in training.
        attn_layer_norm: A LayerNorm of the attention adapters: in front, behind, or none.
        mlp_layer_norm: Likewise of the MLP adapters.
        init: ``"lora"``: the network starts as the pretrained one; ``"bert"``: N(0, 0.02), so not quite.
    """

    width: int = 8
    sites: tuple[Sublayer, ...] = ("attn", "mlp")
    act: str = "relu"
    dropout: float = 0.0
    attn_layer_norm: NormSide = "none"
    mlp_layer_norm: NormSide = "none"
    init: Start = "lora"

    def __post_init__(self) -> None:
        check_options(self.name, width=self.width, act=self.act, sites=self.sites)

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One bottleneck behind every attention and every MLP."""
        found = adapted_branches(anatomy, self.name, self.sites)
        return [behind(anatomy, b, functools.partial(self._layer, b.kind)) for b in found]

    def _layer(self, kind: str, d: int, out: int, axis: int) -> AdapterLayer:
        norm = self.mlp_layer_norm if kind == "mlp" else self.attn_layer_norm
        return AdapterLayer(
            d, self.width, out=out, act=self.act, layer_norm=norm, dropout=self.dropout, init=self.init, axis=axis
        )
