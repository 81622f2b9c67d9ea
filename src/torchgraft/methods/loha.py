"""LoHa: a change of the weight that is a product by elements of two low-rank matrices (FedPara, Hyeon-Woo et al.,
arXiv 2108.06098, ICLR 2022; LyCORIS, Yeh et al., arXiv 2309.14859; the parametrisation of HF peft 0.21).

    dW = (alpha / r) (w1_a w1_b) * (w2_a w2_b)        w1_a, w2_a (out, r), w1_b, w2_b (r, in)

With twice LoRA's parameters it reaches rank r^2. On a convolution the weight counts as a matrix
(out, in / groups * taps), or with ``use_effective_conv2d`` each product is a kernel in Tucker form: t (r, r, *taps),
w_a (r, out), w_b (r, in / groups). Where r^2 is below both sides of a layer that is called, the change follows the
input as one product of rank r^2, so that nothing of the size of the weight is made; elsewhere it acts on the weight.
Sites as for LoRA. The backward of HF peft 0.21 for the Tucker form gives w1_a and w1_b the gradients of other factors;
here it is that of autograd.

Start: w2_b zero, the rest Kaiming-uniform with a = sqrt(5): the pretrained network. A rank above the smaller side is
set to that side, where each product is any matrix already. Mergeable.

Parameters: 2 r (out + in / groups * taps) per weight. ViT-B/16, q and v, r = 8: 589,824.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..core.method import register
from .forms.deltas import Deltas
from .forms.lycoris import hadamard


@register("loha")
@dataclasses.dataclass(frozen=True)
class LoHa(Deltas):
    """Config of LoHa.

    Attributes:
        rank: Rank r of each of the two products.
        alpha: The change is multiplied by alpha / rank.
        targets: Which weights: ``auto``, or one or several of ``q``, ``k``, ``v``, ``qkv`` (a fused weight as one),
            ``proj``, ``fc1``, ``fc2``, ``conv``, ``pointwise``, ``linear``, ``all``.
        rank_pattern: (module, rank) pairs for modules whose rank is another.
        alpha_pattern: (module, alpha) pairs, likewise.
        use_effective_conv2d: Keep kernels in Tucker form.
    """

    use_effective_conv2d: bool = False

    def form(self, layer: nn.Module, weight: Tensor, rank: int, scale: float) -> nn.Module:
        """The product by elements."""
        return hadamard(weight.shape, rank, scale, effective=self.use_effective_conv2d)
