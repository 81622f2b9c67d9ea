"""Multi-head parallel adapter (He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv
2110.04366, ICLR 2022): prefix tuning with a ReLU in the place of its softmax, a bottleneck beside every head.

    head <- head + relu(s q P_k^T) P_v        q = x W_q + b_q, s = 1 / sqrt(e), P_k, P_v (l, e) in every head

with l = ``length``; the frozen W_q P_k^T is the bottleneck's first layer, P_v its second, so it has as many parameters
as a parallel adapter with r = l. The queries are those of the attention itself, with their norms and rotations.
``norm=True`` is the released BART code: q = W_q LN(x) + b_q with a LayerNorm of its own, and s = 1.

Parameters: ``2 l d`` per attention, with ``norm`` 2 d more; ViT-B/16, l = 16: 294,912. Not mergeable: there is a ReLU.
Start: P_v = 0, so the pretrained network, and P_k N(0, 1), so that the scores are of the size of an attention's own.
``init="official"`` has N(0, 0.02) for both, as published.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.method import Method, register
from ..core.placements import Parallel, Placement, Point
from ..errors import GraftError
from .forms.prefix import FreePrefix, attended, key_values


class NormedHeads(FreePrefix):
    """``relu(q P_k^T) P_v`` for every head, with q = query(norm(x)) of the frozen query layer.

    Shapes: (N, tokens, d) -> (N, tokens, d). Parameters: ``2 l d + 2 d``.

    Args:
        length: l.
        width: d.
        heads: Number of heads.
        query: The frozen query layer, which stays the backbone's.
    """

    def __init__(self, length: int, width: int, heads: int, query: nn.Linear) -> None:
        super().__init__(length, width, width)
        self.norm, self.heads, self.query = nn.LayerNorm(query.in_features), heads, (query,)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """What is added to the concatenated heads."""
        q = self.query[0](self.norm(x))
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, self.keys, self.values))
        scores = q.transpose(-3, -2) @ k.permute(1, 2, 0)
        return (scores.relu() @ v.transpose(0, 1)).transpose(-3, -2).flatten(-2)


@register("multihead-adapter")
@dataclasses.dataclass(frozen=True)
class MultiheadAdapter(Method):
    """Config of the multi-head parallel adapter.

    Attributes:
        length: l, the width of the bottleneck beside every head.
        norm: Read the attention's input through a LayerNorm and the query layer again, unscaled.
        init: ``"zero"``: the network starts as the pretrained one; ``"official"``: as published.
    """

    length: int = 16
    norm: bool = False
    init: Literal["zero", "official"] = "zero"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise GraftError(f"multihead-adapter: length={self.length} is not valid; expected at least 1")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A bottleneck beside the heads of every attention."""
        placed: list[Placement] = []
        if self.norm:
            placed += self._normed(anatomy)
        else:
            placed += key_values(anatomy, self.name, self.length, compose="relu")
        if self.init == "zero":
            for placement in placed:
                nn.init.normal_(placement.form.keys)  # type: ignore[union-attr, arg-type]
                nn.init.zeros_(placement.form.values)  # type: ignore[union-attr, arg-type]
        return placed

    def _normed(self, anatomy: Anatomy) -> list[Placement]:
        placed: list[Placement] = []
        for site in attended(anatomy, self.name):
            module, last = anatomy.module(site.home), site.branch.last
            query = next((p for p in site.branch.first if anatomy.site(p).role == "attn.q"), None)
            names = ("num_heads", "num_attention_heads", "n_heads")
            heads = next((getattr(module, n) for n in names if hasattr(module, n)), None)
            if query is None or heads is None or anatomy.calls(last) == 0:
                raise GraftError(
                    f"multihead-adapter: norm=true needs a query layer of its own in {site.home!r}; use norm=false"
                )
            form = NormedHeads(self.length, site.keys, heads, anatomy.module(query))  # type: ignore[arg-type]
            placed.append(Parallel(form, Point(site.home, "input"), Point(last, "input"), slot="prefix"))
        return placed
