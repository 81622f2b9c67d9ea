"""RSSeg at the level of local patches: the pathway beside the backbone, and the separation of neighbours.

A re-design of two modules that the abstract of "Representation Separation for Semantic Segmentation with Vision
Transformers", arXiv:2212.13764, names and describes; see :mod:`.rsseg`. For taps G_1 ... G_n of a backbone and G_0,
what its first block reads:

    HP(y) = y - mean of y over 3x3                   at the border over what is inside
    L_0   = LN(conv(G_0))
    L_i   = L_(i-1) + B_i(L_(i-1) + HP(conv(G_i)))   (B, d, h, w);  B(y) = W2 GELU(W1 LN(depthwise 3x3(y)))
    U     = fuse([conv(LN(G_n)); L_n])

and on U, for the k x k neighbours q of a position p that are inside the map:

    w(p, q) = softmax over q of <theta(U)_p, phi(U)_q> / sqrt(e)
    mu_p    = sum_q w(p, q) U_q
    a_p     = 2 sigmoid(gate(U)_p)
    Y_p     = U_p + softplus(beta) a_p (U_p - mu_p)

The pathway reads the backbone and never writes into it. Softplus keeps the second module a separator: with a free sign
it can learn to smooth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ...errors import GraftError

__all__ = ["PathwayFeatures", "Separated", "SpatiallyAdaptiveSeparation", "TwoPathway", "local_discrepancy"]

_STRENGTH_AT_START = -2.0
"""Of beta before softplus: a strength of 0.127."""


class PathwayFeatures(NamedTuple):
    """What the pathway returns.

    Attributes:
        fused: U (B, d, h, w).
        local: L_n (B, d, h, w).
    """

    fused: Tensor
    local: Tensor


class Separated(NamedTuple):
    """What the separation returns.

    Attributes:
        output: Y (B, d, h, w).
        local_mean: mu (B, d, h, w).
        gate: a (B, 1, h, w), between 0 and 2.
    """

    output: Tensor
    local_mean: Tensor
    gate: Tensor


def local_discrepancy(x: Tensor) -> Tensor:
    """HP: a map (B, C, h, w) less its mean over 3x3; that of a constant map is 0 everywhere."""
    return x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class TwoPathway(nn.Module):
    """The pathway of local discrepancy beside a backbone, joined with the last tap.

    Parameters for a width D of all taps: d (D + 1) + 2 d + n (d (D + 1) + 4 d^2 + 15 d) + 2 D + d (D + 1) + 2 d^2 + d.

    Args:
        in_channels: Channels of G_0, G_1, ... G_n.
        dim: Width d.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(self, in_channels: Sequence[int], dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        stem, *taps = in_channels
        self.stem = nn.Conv2d(stem, dim, 1, **dd)
        self.stem_norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.taps = nn.ModuleList(nn.Conv2d(width, dim, 1, **dd) for width in taps)
        self.blocks = nn.ModuleList(PathwayBlock(dim, **dd) for _ in taps)
        self.glob_norm = LayerNorm2d(taps[-1], eps=1e-6, **dd)
        self.glob = nn.Conv2d(taps[-1], dim, 1, **dd)
        self.fuse = nn.Conv2d(2 * dim, dim, 1, **dd)

    def forward(self, maps: Sequence[Tensor]) -> PathwayFeatures:
        """Maps G_0 ... G_n to maps of the size of G_1, the finest tap; others are resized bilinearly."""
        first, *taps = maps
        size = taps[0].shape[-2:]
        local = self.stem_norm(_resized(self.stem(first), size))
        for conv, block, tap in zip(self.taps, self.blocks, taps, strict=True):
            local = local + block(local + local_discrepancy(_resized(conv(tap), size)))
        whole = _resized(self.glob(self.glob_norm(taps[-1])), size)
        return PathwayFeatures(self.fuse(torch.cat([whole, local], dim=1)), local)


class PathwayBlock(nn.Module):
    """B: (B, d, h, w) to the same; starts at zero."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-6, **dd)
        self.fc1 = nn.Conv2d(dim, 2 * dim, 1, **dd)
        self.fc2 = nn.Conv2d(2 * dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Depthwise, norm, and two 1x1 convolutions."""
        return self.fc2(F.gelu(self.fc1(self.norm(self.dw(x)))))


class SpatiallyAdaptiveSeparation(nn.Module):
    """Moves every position away from the weighted mean of its neighbours, as far as the position wants.

    Parameters: 2 (d e + e) + (9 d + 1) + d.

    Args:
        dim: Width d.
        key_dim: Width e of theta and phi.
        kernel: Side k of the neighbourhood, odd.
        signed: Beta itself is the strength, of either sign, and starts at 0.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: The kernel is even.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        kernel: int = 3,
        signed: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise GraftError(f"RSSeg: kernel={kernel}: expected an odd number, so that a position has a middle")
        dd = {"device": device, "dtype": dtype}
        self.kernel, self.signed = kernel, signed
        self.theta = nn.Conv2d(dim, key_dim, 1, **dd)
        self.phi = nn.Conv2d(dim, key_dim, 1, **dd)
        self.gate = nn.Conv2d(dim, 1, 3, padding=1, **dd)
        self.beta = nn.Parameter(torch.full((dim,), 0.0 if signed else _STRENGTH_AT_START, **dd))

    def forward(self, x: Tensor) -> Separated:
        """A map U (B, d, h, w) to Y."""
        query, key = self.theta(x), self.phi(x)
        scores = torch.stack([(query * near).sum(1) for near in _neighbours(key, self.kernel)], dim=1)
        inside = torch.cat(list(_neighbours(torch.ones_like(x[:1, :1]), self.kernel)), dim=1).bool()
        scores = (scores / math.sqrt(query.shape[1])).masked_fill(~inside, -math.inf)
        weights = scores.softmax(1)
        mean = torch.zeros_like(x)
        # One neighbour at a time: what is kept for the backward are views of one padded map, not k^2 copies.
        for weight, near in zip(weights.unbind(1), _neighbours(x, self.kernel), strict=True):
            mean = mean + weight[:, None] * near
        gate = 2 * self.gate(x).sigmoid()
        strength = self.beta if self.signed else F.softplus(self.beta)
        return Separated(x + strength[:, None, None] * gate * (x - mean), mean, gate)


def _neighbours(x: Tensor, kernel: int) -> Iterator[Tensor]:
    """The map moved by every offset of a k x k window, zero outside of it; views of one padded map."""
    margin = kernel // 2
    height, width = x.shape[-2:]
    padded = F.pad(x, (margin, margin, margin, margin))
    for top in range(kernel):
        for left in range(kernel):
            yield padded[..., top : top + height, left : left + width]


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
