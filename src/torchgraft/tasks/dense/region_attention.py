"""RSSeg at the level of regions: class queries that attend to the pixels of their class.

A re-design of the discriminative cross-attention that the abstract of "Representation Separation for Semantic
Segmentation with Vision Transformers", arXiv:2212.13764, names; see :mod:`.rsseg`. With pixels y = Y flattened
(B, h w, d), H heads and one learned query per class, R (B, K, d), every layer does

    M = (W_q LN(R)) (W_k LN(y))^T / sqrt(d / H)      (B, H, K, h w)
    R = R + W_o(softmax over the pixels of M, W_v LN(y))
    R = R + FFN(LN(R))                               width 4 d

and behind the last R = LN(R), mask = (W_p y) R^T / sqrt(d), region logits = W_c R (B, K, K). The mean of M over the
heads is trained as a segmentation, and row k of the region logits to be class k.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError

__all__ = ["DiscriminativeCrossAttention", "Regions"]


class Regions(NamedTuple):
    """What the cross-attention returns.

    Attributes:
        mask: (B, K, h, w).
        attention: The attention logits (B, K, h, w) of every layer, mean over the heads.
        region_logits: (B, K, K): for the region of every class, the logits of the classes.
    """

    mask: Tensor
    attention: list[Tensor]
    region_logits: Tensor


class DiscriminativeCrossAttention(nn.Module):
    """Class queries against the pixels of a map of any size.

    Parameters for N layers: K d + N (12 d^2 + 15 d) + K d + K + d^2 + d + 2 d.

    Args:
        dim: Width d.
        num_classes: K.
        layers: N.
        heads: H, which divides d.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: The heads do not divide the width, or there is no layer.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        layers: int = 2,
        heads: int = 8,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise GraftError(f"RSSeg: heads={heads} do not divide dim={dim}")
        if layers < 1:
            raise GraftError(f"RSSeg: layers={layers}: expected at least 1")
        dd = {"device": device, "dtype": dtype}
        self.query = nn.Parameter(torch.empty(num_classes, dim, **dd))
        self.layers = nn.ModuleList(RegionLayer(dim, heads, **dd) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, **dd)
        self.pix = nn.Linear(dim, dim, **dd)
        self.cls = nn.Linear(dim, num_classes, **dd)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, x: Tensor) -> Regions:
        """A map Y (B, d, h, w) to masks, attention logits and region logits."""
        size = x.shape[-2:]
        pixels = x.flatten(2).transpose(1, 2)
        regions = self.query.expand(len(x), -1, -1)
        attention = []
        for layer in self.layers:
            regions, scores = layer(regions, pixels)
            attention.append(scores.mean(1).unflatten(-1, size))
        regions = self.norm(regions)
        mask = regions @ self.pix(pixels).transpose(1, 2) / math.sqrt(x.shape[1])
        return Regions(mask.unflatten(-1, size), attention, self.cls(regions))


class RegionLayer(nn.Module):
    """One layer: regions (B, K, d) and pixels (B, n, d) to regions and the attention logits (B, H, K, n)."""

    def __init__(self, dim: int, heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.nq, self.nk, self.nf = (nn.LayerNorm(dim, **dd) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, **dd) for _ in range(4))
        self.f1, self.f2 = nn.Linear(dim, 4 * dim, **dd), nn.Linear(4 * dim, dim, **dd)

    def forward(self, regions: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the pixels, then the FFN."""
        normed = self.nk(pixels)
        query, key, value = self._split(self.q(self.nq(regions))), self._split(self.k(normed)), self.v(normed)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        found = scores.softmax(-1) @ self._split(value)
        regions = regions + self.o(found.transpose(1, 2).flatten(2))
        return regions + self.f2(F.gelu(self.f1(self.nf(regions)))), scores

    def _split(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, H, n, d / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
