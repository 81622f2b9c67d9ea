"""MAM adapter, "mix and match" (He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv
2110.04366, ICLR 2022): a short prefix in every attention and a scaled parallel adapter beside every MLP.

    head = softmax(q [P_k; K]^T / sqrt(e) + [0, mask]) [P_v; V]              P_k, P_v (l, e) in every head
    m <- m + s (relu(x W_d + b_d) W_u + b_u)                                 m: what the MLP adds to the residual stream

with l = ``length``, r = ``width``, s = ``scale``. x is the residual stream in front of the MLP's norm (mBART,
AdaptFormer) or behind it; in post-norm blocks these are the same. See the methods ``prefix`` and
``scaled-parallel-adapter`` for either part.

Parameters: ``2 l d`` per attention and ``2 r d + r + d`` per MLP; ViT-B/16 and RoBERTa-base, l = r = 16: 599,232
(589,824 without biases, 0.5 % of RoBERTa-base); BART-large, l = 30, r = 512: 27,377,664 without biases (6.7 %).

Not mergeable: softmax and ReLU. Start: W_u = 0, and the prefix N(0, 0.02) as published, whose keys take a share of
every softmax, so not the pretrained network.
"""

from __future__ import annotations

import dataclasses

from ..core.anatomy import Anatomy
from ..core.method import Method, register
from ..core.placements import Placement
from ..errors import GraftError
from .forms.adapter_layer import AdapterLayer
from .forms.branch_adapters import AdapterInput, adapted_branches, beside, check_options
from .forms.prefix import key_values


@register("mam")
@dataclasses.dataclass(frozen=True)
class MAM(Method):
    """Config of the MAM adapter; the defaults are those of the paper's GLUE script (30, 512 and 4 for XSum, en-ro).

    Attributes:
        length: l, keys and values per attention.
        width: r.
        scale: s.
        adapter_input: What the MLP's adapter reads: the stream in front of the norm or behind it.
        dropout: Behind the ReLU, in training.
        reparametrise: Train a net that computes the prefixes, as in the method ``prefix``.
        mid: Width of the net's middle layer.
    """

    length: int = 16
    width: int = 16
    scale: float = 2.0
    adapter_input: AdapterInput = "pre_norm"
    dropout: float = 0.0
    reparametrise: bool = False
    mid: int = 800

    def __post_init__(self) -> None:
        check_options(self.name, width=self.width)
        for field in ("length", "mid"):
            if getattr(self, field) < 1:
                raise GraftError(f"mam: {field}={getattr(self, field)} is not valid; expected at least 1")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A prefix at every attention and a bottleneck beside every MLP."""
        mid = self.mid if self.reparametrise else None
        prefixes = key_values(anatomy, self.name, self.length, mid=mid)
        branches = adapted_branches(anatomy, self.name, ["mlp"])
        return [*prefixes, *(beside(anatomy, branch, self._layer, self.adapter_input) for branch in branches)]

    def _layer(self, d: int, out: int, axis: int) -> AdapterLayer:
        return AdapterLayer(d, self.width, out=out, scale=self.scale, dropout=self.dropout, init="lora", axis=axis)
