"""LoKr: a change of the weight that is a Kronecker product (LyCORIS, Yeh et al., arXiv 2309.14859, ICLR 2024; the
parametrisation of HF peft 0.21).

    dW = (alpha / r) (w1 kron w2),    w2 = w2_a w2_b        (out, in) = (l k, m n)
                                                            w1 (l, m), w2_a (k, r), w2_b (r, n)

l and k are the two factors of out that are nearest to each other, or ``decompose_factor`` and the rest; m and n those
of in. w2 is kept whole where r is at least half its larger side; ``decompose_both`` makes w1 a product too. On a
convolution w2 is a kernel (k, n, *taps) and w2_b is (r, n taps), or with ``use_effective_conv2d`` w2 is in Tucker form:
t2 (r, r, *taps), w2_a (r, k), w2_b (r, n). The input is followed by two small products, so no change of the weight's
size is made; groups, layers that their parent reads and the rest as for LoRA, and so are the sites.

KronA (``krona``) is the same product with free shapes, without r. HF peft 0.21 multiplies the wrong axes for a one-
dimensional convolution whose w2 is whole; here it is the product that the formula says.

Start: w1 (or w1_a) zero, the rest Kaiming-uniform with a = sqrt(5): the pretrained network. Mergeable.

Parameters per weight: l m + r (k + n taps), or l m + k n taps. ViT-B/16, q and v, r = 8: 26,112.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..core.method import register
from ..errors import GraftError
from .forms.deltas import Deltas
from .forms.lycoris import KroneckerDelta


@register("lokr")
@dataclasses.dataclass(frozen=True)
class LoKr(Deltas):
    """Config of LoKr.

    Attributes:
        rank: Rank r of w2 (and of w1, where asked for).
        alpha: The change is multiplied by alpha / rank.
        targets: Which weights: ``auto``, or one or several of ``q``, ``k``, ``v``, ``qkv`` (a fused weight as one),
            ``proj``, ``fc1``, ``fc2``, ``conv``, ``pointwise``, ``linear``, ``all``.
        rank_pattern: (module, rank) pairs for modules whose rank is another.
        alpha_pattern: (module, alpha) pairs, likewise.
        decompose_both: Let w1 be a product of rank r too, where that is smaller.
        decompose_factor: First factor of both sides where it divides them; -1: the split nearest to a square.
        use_effective_conv2d: Keep kernels in Tucker form.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise GraftError(
                f"lokr: decompose_factor={self.decompose_factor} is not valid; expected -1 or a number of at least 1"
            )

    def form(self, layer: nn.Module, weight: Tensor, rank: int, scale: float) -> nn.Module:
        """The Kronecker product."""
        return KroneckerDelta(
            weight.shape,
            rank,
            scale,
            decompose_both=self.decompose_both,
            factor=self.decompose_factor,
            effective=self.use_effective_conv2d,
        )
