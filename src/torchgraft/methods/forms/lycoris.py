"""Deltas of LyCORIS (Yeh et al., arXiv 2309.14859): a Kronecker product (LoKr) and a product by elements (LoHa)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.layers import ConvGeometry
from ...core.placements.weight import in_type_of
from .kronecker import kron_apply, kron_delta
from .low_rank import along_conv


class KroneckerDelta(nn.Module):
    """``scale * (w1 kron w2)`` in the shape of a weight (first, second, *kernel); starts at zero.

    ``first = l k`` and ``second = m n``; w1 (l, m), w2 (k, n, *kernel). Either may be a product of rank r: w1 when
    ``decompose_both`` and r < max(l, m) / 2, w2 when r < max(k, n) / 2.

    Shapes: w1, or w1_a (l, r) and w1_b (r, m); w2, or w2_a (k, r) and w2_b (r, n * kernel); with ``effective``
    and a kernel above 1: t2 (r, r, *kernel), w2_a (r, k), w2_b (r, n). w1 (or w1_a) starts at zero, the rest
    Kaiming-uniform with a = sqrt(5).
    Parameters: l m + k n kernel, or with r: r (l + m), r (k + n kernel), r (k + n) + r^2 kernel.

    Args:
        shape: Shape of the weight, or of the rows that change.
        rank: r.
        scale: Factor of the product.
        decompose_both: Let w1 be a product too.
        factor: First factor of both sides where it divides them; -1: the split nearest to a square.
        effective: The Tucker form of a kernel.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        scale: float,
        *,
        decompose_both: bool = False,
        factor: int = -1,
        effective: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.kernel = rank, scale, tuple(shape[2:])
        taps = math.prod(self.kernel)
        (rows1, rows2), (cols1, cols2) = split(shape[0], factor), split(shape[1], factor)
        if decompose_both and rank < max(rows1, cols1) / 2:
            self.w1_a, self.w1_b = nn.Parameter(torch.zeros(rows1, rank)), _kaiming(rank, cols1)
        else:
            self.w1 = nn.Parameter(torch.zeros(rows1, cols1))
        if rank >= max(rows2, cols2) / 2:
            self.w2 = _kaiming(rows2, cols2, *self.kernel)
        elif effective and taps > 1:
            self.t2 = _kaiming(rank, rank, *self.kernel)
            self.w2_a, self.w2_b = _kaiming(rank, rows2), _kaiming(rank, cols2)
        else:
            self.w2_a, self.w2_b = _kaiming(rows2, rank), _kaiming(rank, cols2 * taps)

    def forward(self) -> Tensor:
        """The change, in the shape of the weight."""
        w1, w2 = self._factors()
        return self.scale * kron_delta(w1.T, w2 if self.kernel else w2.T)

    def along(self, x: Tensor, geometry: ConvGeometry | None) -> Tensor:
        """What the change makes of an input (..., in), or (N, in, *space), by two small products."""
        w1, w2 = self._factors()
        x = in_type_of(x, w1)
        if geometry is None:
            return self.scale * kron_apply(x, w1.T, w2.T)
        outer = w1 if geometry.transposed else w1.T  # (in, out)
        maps = geometry.apply(x.unflatten(1, (outer.shape[0], -1)).flatten(0, 1), w2, 1)
        maps = maps.unflatten(0, (x.shape[0], outer.shape[0]))
        return torch.einsum("io,ni...->no...", self.scale * outer, maps).flatten(1, 2)

    def _factors(self) -> tuple[Tensor, Tensor]:
        w1 = self.w1 if hasattr(self, "w1") else self.w1_a @ self.w1_b
        if hasattr(self, "w2"):
            return w1, self.w2
        if hasattr(self, "t2"):
            return w1, tucker(self.t2, self.w2_a, self.w2_b)
        return w1, (self.w2_a @ self.w2_b).view(self.w2_a.shape[0], -1, *self.kernel)


class HadamardDelta(nn.Module):
    """``scale * (w1_a w1_b) * (w2_a w2_b)``, by elements, in the shape of a weight; starts at zero.

    Two products of rank r reach rank r^2. A rank above the smaller side is set to that side.

    Shapes: w1_a, w2_a (first, r); w1_b, w2_b (r, others); with ``effective`` and a kernel above 1: t1, t2
    (r, r, *kernel), w1_a, w2_a (r, first), w1_b, w2_b (r, second). w2_b starts at zero, the rest Kaiming-uniform
    with a = sqrt(5).
    Parameters: 2 r (first + others), or 2 r (first + second) + 2 r^2 kernel.

    Args:
        shape: Shape of the weight, or of the rows that change; the others of its axes count as one.
        rank: r.
        scale: Factor of the product.
        effective: The Tucker form of a kernel.
    """

    def __init__(self, shape: Sequence[int], rank: int, scale: float, *, effective: bool = False) -> None:
        super().__init__()
        self.shape, self.scale = tuple(shape), scale
        first, others = shape[0], math.prod(shape[1:])
        rank = min(rank, first, others)
        if effective and math.prod(shape[2:]) > 1:
            self.t1, self.t2 = _kaiming(rank, rank, *shape[2:]), _kaiming(rank, rank, *shape[2:])
            self.w1_a, self.w1_b = _kaiming(rank, first), _kaiming(rank, shape[1])
            self.w2_a, self.w2_b = _kaiming(rank, first), nn.Parameter(torch.zeros(rank, shape[1]))
        else:
            self.w1_a, self.w1_b = _kaiming(first, rank), _kaiming(rank, others)
            self.w2_a, self.w2_b = _kaiming(first, rank), nn.Parameter(torch.zeros(rank, others))

    def forward(self) -> Tensor:
        """The change, in the shape of the weight."""
        if hasattr(self, "t1"):
            first, second = tucker(self.t1, self.w1_a, self.w1_b), tucker(self.t2, self.w2_a, self.w2_b)
        else:
            first, second = self.w1_a @ self.w1_b, self.w2_a @ self.w2_b
        return (self.scale * first * second).view(self.shape)


class HadamardAlong(HadamardDelta):
    """The same for small ranks: as one product of rank r^2 it can follow the input, so that no W is made."""

    def along(self, x: Tensor, geometry: ConvGeometry | None) -> Tensor:
        """What the change makes of an input (..., in), or (N, in, *space)."""
        x = in_type_of(x, self.w1_a)
        up = (self.w1_a.unsqueeze(2) * self.w2_a.unsqueeze(1)).flatten(1)  # (first, r^2)
        down = (self.w1_b.unsqueeze(1) * self.w2_b.unsqueeze(0)).flatten(0, 1)  # (r^2, others)
        if geometry is None:
            return F.linear(F.linear(x, down), self.scale * up)
        return along_conv(x, down, up, self.shape, geometry, self.scale)


def hadamard(shape: Sequence[int], rank: int, scale: float, *, effective: bool) -> HadamardDelta:
    """The form that fits: following the input pays where rank r^2 is below both sides of the weight."""
    tuckers = effective and math.prod(shape[2:]) > 1
    small = not tuckers and rank**2 < min(shape[0], math.prod(shape[1:]))
    return (HadamardAlong if small else HadamardDelta)(shape, rank, scale, effective=effective)


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of ``size``, the smaller first.

    With a factor that divides it: (factor, size / factor), in this order. Else the pair nearest to a square whose
    smaller part is at most ``factor`` (-1: any).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    root = math.isqrt(size)
    small = max((d for d in range(1, root + 1) if size % d == 0 and d <= limit), default=1)
    return small, size // small


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(r, r, *kernel), (r, first), (r, second) -> (first, second, *kernel)."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def _kaiming(*shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape))
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return parameter
