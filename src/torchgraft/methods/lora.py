"""LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, ICLR 2022), with rsLoRA
(Kalajdzievski, arXiv 2312.03732) and DoRA (Liu et al., arXiv 2402.09353, ICML 2024).

    y = W x + b + (alpha / r) B A x        A = down (r, in), B = up (out, r)

    rsLoRA   alpha / sqrt(r) in place of alpha / r
    DoRA     W' = m * (W + s B A) / ||W + s B A||     m = magnitude (out,), the norm per output channel

On a convolution W is the kernel as a matrix (out, in / groups * k * k), so A B is a change of the kernel itself:
right under groups, dilation, strides and every padding rule, and never larger than the kernel. Where a layer
standardises its weight the change belongs on the standardised weight. Linear layers and ungrouped convolutions that
are called compute B (A x) beside the layer; elsewhere (``nn.MultiheadAttention``, layers that their parent reads,
groups, DoRA) the sum is what the layer reads as its weight.

Default sites: q and v of every attention, as rows of a fused weight; where a fused weight holds its heads side by
side (CoAtNet, LeViT) all of it. On models without attention: every convolution and linear layer of the blocks.

Start: A Kaiming-uniform with a = sqrt(5), B zero, m the norms of W: the pretrained network. A rank above the smaller
side of W is set to that side, where B A is any matrix already (a depthwise 3x3 kernel: 9); the scale stays that of
the given rank. Mergeable, also DoRA.

Parameters: r (out + in / groups * k * k) per weight, out more with DoRA. ViT-B/16, q and v, r = 8: 294,912.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.layers import is_conv, is_standardised
from ..core.method import register
from ..core.placements import WeightDelta
from ..errors import GraftError
from .forms.deltas import Deltas
from .forms.low_rank import DoRA, LowRank
from .forms.targets import Weight


@register("lora")
@dataclasses.dataclass(frozen=True)
class LoRA(Deltas):
    """Config of LoRA.

    Attributes:
        rank: Rank r.
        alpha: The change is multiplied by alpha / rank.
        targets: Which weights: ``auto``, or one or several of ``q``, ``k``, ``v``, ``qkv`` (a fused weight as one),
            ``proj``, ``fc1``, ``fc2``, ``conv``, ``pointwise``, ``linear``, ``all``.
        rank_pattern: (module, rank) pairs for modules whose rank is another.
        alpha_pattern: (module, alpha) pairs, likewise.
        rslora: Multiply by alpha / sqrt(rank) instead (rsLoRA).
        dropout: Probability of the dropout on the input of A.
        dora: Give the changed weight a magnitude of its own per output channel (DoRA).
    """

    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise GraftError(f"lora: dropout={self.dropout} is not valid; expected a number from 0 up to 1")
        if self.dora and self.dropout:
            raise GraftError(
                f"lora: dora=true changes the weight itself, so dropout={self.dropout} has no input to act on; "
                "set one of them only"
            )

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of the change."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def form(self, layer: nn.Module, weight: Tensor, rank: int, scale: float) -> nn.Module:
        """B A, with a magnitude where asked for."""
        return DoRA(weight, rank, scale) if self.dora else LowRank(weight.shape, rank, scale, self.dropout)

    def placed(self, anatomy: Anatomy, weight: Weight, rank: int, scale: float) -> WeightDelta:
        """As for every delta, if the options fit the layer."""
        layer = anatomy.module(weight.path)
        if self.dora and (is_standardised(layer) or (is_conv(layer) and layer.transposed)):
            raise GraftError(
                f"lora: dora=true cannot act at {weight.path!r}, "
                + ("whose weight is standardised" if is_standardised(layer) else "a transposed convolution")
                + f"; exclude it with exclude={weight.path!r} or set dora=false"
            )
        placement = super().placed(anatomy, weight, rank, scale)
        if self.dropout and not (placement.beside and placement.groups == 1):
            raise GraftError(
                f"lora: dropout={self.dropout} acts on the input of A, but at {weight.path!r} the weight itself is "
                f"changed (groups, or its parent reads it); exclude it with exclude={weight.path!r} or set dropout=0"
            )
        return placement
