"""A change of low rank, ``B A``, of a weight of any shape, and the same with a magnitude of its own (DoRA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.layers import ConvGeometry
from ...core.placements.weight import in_type_of


class LowRank(nn.Module):
    """``scale * B A``, in the shape of the weight; starts at zero.

    The weight is read as a matrix (first axis, all others): (out, in) of a linear layer, (out, in / groups * kernel)
    of a convolution, (in, out / groups * kernel) of a transposed one.

    Shapes: A = ``down`` (rank, others), Kaiming-uniform with a = sqrt(5); B = ``up`` (first, rank), zero.
    Parameters: rank * (first + others). A rank above the smaller side is set to the smaller side: there the product
    is any matrix already.

    Args:
        shape: Shape of the weight, or of the rows that change.
        rank: Rank r.
        scale: Factor of the product.
        dropout: Probability of the dropout on the input; acts beside the layer only.
    """

    def __init__(self, shape: Sequence[int], rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.scale, self.dropout = tuple(shape), scale, dropout
        first, others = shape[0], math.prod(shape[1:])
        rank = min(rank, first, others)
        self.down = nn.Parameter(torch.empty(rank, others))
        self.up = nn.Parameter(torch.zeros(first, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """The change, in the shape of the weight."""
        return (self.scale * self.up @ self.down).view(self.shape)

    def along(self, x: Tensor, geometry: ConvGeometry | None) -> Tensor:
        """What the change makes of an input (..., in), or (N, in, *space): first A, then B, so that no W is made."""
        x = in_type_of(x, self.down)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if geometry is None:
            return F.linear(F.linear(x, self.down), self.scale * self.up)
        return along_conv(x, self.down, self.up, self.shape, geometry, self.scale)


class DoRA(LowRank):
    """``m * (W + scale * B A) / ||W + scale * B A||``, the norm per output channel; starts as W.

    Shapes: m = ``magnitude`` (out,), the norms of W at the start. Parameters: rank * (first + others) + out. The norm
    in the denominator gets no gradient, as in section 4.3 of the paper (arXiv 2402.09353).

    Args:
        weight: The weight, or the rows that change; the first axis is the output.
        rank: Rank r.
        scale: Factor of the product.
    """

    precise: ClassVar[tuple[str, ...]] = ("magnitude",)
    """Read in its own type where a form's other parameters are read in the backbone's: it is near the exact norms."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__(weight.shape, rank, scale)
        self.magnitude = nn.Parameter(_norms(weight).to(weight.dtype))

    def replace(self, weight: Tensor) -> Tensor:
        """The new weight."""
        changed = weight + self()
        factor = self.magnitude / _norms(changed).clamp_min(torch.finfo(torch.float32).tiny)
        return changed * factor.to(changed.dtype).view(-1, *[1] * (weight.dim() - 1))


def along_conv(
    x: Tensor, down: Tensor, up: Tensor, shape: Sequence[int], geometry: ConvGeometry, scale: float
) -> Tensor:
    """``scale * B A`` as two convolutions, one of them with a 1x1 kernel.

    Args:
        x: Input (N, in, *space).
        down: A (rank, others).
        up: B (first, rank).
        shape: Shape of the weight (first, other channels, *kernel); first is the output, of a transposed
            convolution the input.
        geometry: How the convolution slides.
        scale: Factor.
    """
    rank, kernel = down.shape[0], down.view(-1, *shape[1:])
    dims = len(shape) - 2
    pointwise = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    ones = [1] * dims
    if geometry.transposed:
        return geometry.apply(pointwise(x, scale * up.t().reshape(rank, -1, *ones)), kernel, 1)
    return pointwise(geometry.apply(x, kernel, 1), scale * up.view(-1, rank, *ones))


def _norms(weight: Tensor) -> Tensor:
    """The norm of every output channel, in float32 and without a gradient."""
    return torch.linalg.vector_norm(weight.detach().flatten(1), dim=1, dtype=torch.float32)
