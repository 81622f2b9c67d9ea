"""Prefix tuning (Li and Liang, arXiv 2101.00190, ACL 2021) as in "Towards a Unified View of Parameter-Efficient
Transfer Learning" (He et al., arXiv 2110.04366, ICLR 2022): l learned keys and values in every attention.

    head = softmax(q [P_k; K]^T / sqrt(e) + [0, mask]) [P_v; V]        P_k, P_v (l, e) in every head of width e
         = (1 - lambda) softmax(q K^T / sqrt(e) + mask) V + lambda softmax(q P_k^T / sqrt(e)) P_v

with l = ``length``. P_k and P_v bypass W_k, W_v, norms of keys, rotations and position biases; every query sees them,
under causal and padding masks too. ``gated=False`` adds the two softmaxes without lambda (Table 4 of the paper).
The windows of a windowed attention share one prefix. Self-attention of encoders and decoders and cross-attention
each have their own.

``reparametrise=True`` computes the prefixes of one kind of attention from one net while they are trained,
``up(tanh(down(embedding)))`` with ``mid`` units, as published; :func:`finalise` then drops the net.

Parameters: ``2 l d`` per attention; ViT-B/16: 294,912 (l = 16), 552,960 (l = 30); BART-large, l = 200: 14,745,600
(3.6 %). A net has ``l d + (d + 1) mid + (mid + 1) 2 L d``; ViT-B/16, l = 16, mid = 800: 15,391,520 while training.

Not mergeable: the keys join a softmax. Start: N(0, 0.02), with the net as PyTorch starts it, as published. The new
keys take a share of every softmax, so not the pretrained network.
"""

from __future__ import annotations

import dataclasses

from ..core.anatomy import Anatomy
from ..core.method import Method, register
from ..core.placements import Placement
from ..errors import GraftError
from .forms.prefix import finalise, key_values

__all__ = ["Prefix", "finalise"]


@register("prefix")
@dataclasses.dataclass(frozen=True)
class Prefix(Method):
    """Config of prefix tuning.

    Attributes:
        length: l, keys and values per attention.
        gated: One softmax over both; otherwise two, added.
        reparametrise: Train a net that computes them, one per kind of attention.
        mid: Width of the net's middle layer.
    """

    length: int = 30
    gated: bool = True
    reparametrise: bool = False
    mid: int = 800

    def __post_init__(self) -> None:
        for field in ("length", "mid"):
            if getattr(self, field) < 1:
                raise GraftError(f"prefix: {field}={getattr(self, field)} is not valid; expected at least 1")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """Keys and values at every attention."""
        mid = self.mid if self.reparametrise else None
        return [*key_values(anatomy, self.name, self.length, compose="joint" if self.gated else "apart", mid=mid)]
