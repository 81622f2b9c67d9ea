"""Changes of weights that share their outer factors: tensor train and Tucker form of one tensor for a whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.layers import ConvGeometry
from ...core.placements.weight import in_type_of
from .pointwise import pixels_read


class SharedFactors(nn.Module):
    """``scale * V K U^T`` on every d x d block of a weight, with U and V shared by many weights (arXiv 2212.03145).

    The weight is (outs d, ins d), cut into ``outs`` blocks of d rows and ``ins`` of d columns; a trailing 1 x 1 of a
    convolution does not matter. Subclasses give the inner factor K = :meth:`core`, one r x r matrix per block.

    Shapes: U^T = ``u`` (r, d), V = ``v`` (d, r); core (outs r, ins r).

    Args:
        shape: Shape of the weight.
        u: Shared; the very parameter is kept, not a copy.
        v: Likewise.
        scale: s.
        dropout: Probability of the dropout between K and V, in training; acts beside the layer only, because there
            is no code of a token where only the weight is seen.
    """

    def __init__(self, shape: Sequence[int], u: nn.Parameter, v: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__()
        self.u, self.v = u, v
        self.shape, self.scale, self.dropout = tuple(shape), scale, dropout
        self.rank, self.width = u.shape
        self.outs, self.ins = shape[0] // self.width, shape[1] // self.width

    def core(self) -> Tensor:
        """K (outs r, ins r)."""
        raise TypeError(f"{type(self).__name__} defines no core")

    def forward(self) -> Tensor:
        """The change, in the shape of the weight."""
        core = self.core().view(self.outs, self.rank, self.ins, self.rank)
        return self.scale * torch.einsum("dr,orip,pe->odie", self.v, core, self.u).reshape(self.shape)

    def along(self, x: Tensor, geometry: ConvGeometry | None) -> Tensor:
        """What the change makes of an input (..., in), or (N, in, *space)."""
        x = in_type_of(x, self.u)
        features = x if geometry is None else pixels_read(x, geometry)
        if features is None:  # a 1 x 1 convolution that pads
            assert geometry is not None
            return geometry.apply(x, self(), 1)
        code = F.linear(features.unflatten(-1, (self.ins, self.width)), self.u).flatten(-2)
        code = F.dropout(F.linear(code, self.core()), self.dropout, self.training)
        y = self.scale * F.linear(code.unflatten(-1, (self.outs, self.rank)), self.v).flatten(-2)
        return y if geometry is None else y.movedim(-1, 1)


class TensorTrain(SharedFactors):
    """K is a parameter of each weight: S = ``s`` (outs r, ins r), as ``nn.Linear`` starts.

    Parameters: ``outs ins r^2`` per weight, and ``2 d r`` shared.
    """

    def __init__(self, shape: Sequence[int], u: nn.Parameter, v: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__(shape, u, v, scale, dropout)
        self.s = nn.Parameter(torch.empty(self.outs * self.rank, self.ins * self.rank))
        nn.init.kaiming_uniform_(self.s, a=math.sqrt(5))

    def core(self) -> Tensor:
        """S."""
        return self.s


class Tucker(SharedFactors):
    """K = sum_t C[:, :, t] P[t, i] for each block i, with C and P shared too.

    The released code takes the r x r matrices of an MLP from a reshaped slab: element (a, m) of the (r, n r) matrix is
    ``T[a, m // n, m % n]`` of the n matrices T, where the paper has ``T[a, m % r, m // r]``.

    Shapes: C = ``c`` (r, r, r), in, out, t; P = ``p`` (r, blocks of all weights).
    Parameters: ``r^3`` and ``r`` per block, all shared.

    Args:
        shape: As for :class:`SharedFactors`; likewise ``u``, ``v``, ``scale``, ``dropout``.
        u: See there.
        v: See there.
        scale: See there.
        dropout: See there.
        c: Shared.
        p: Shared.
        start: Column of P of this weight's first block.
        reshaped: Read the blocks as the released code does for an MLP.
    """

    def __init__(
        self,
        shape: Sequence[int],
        u: nn.Parameter,
        v: nn.Parameter,
        scale: float,
        dropout: float,
        *,
        c: nn.Parameter,
        p: nn.Parameter,
        start: int,
        reshaped: bool,
    ) -> None:
        super().__init__(shape, u, v, scale, dropout)
        self.c, self.p = c, p
        self.start, self.reshaped = start, reshaped

    def core(self) -> Tensor:
        """K of every block, from C and this weight's columns of P."""
        r, n = self.rank, self.outs * self.ins
        blocks = self.c @ self.p[:, self.start : self.start + n]  # in, out, block
        if self.reshaped:
            rows = blocks.reshape(r, n * r)
            return rows if self.ins > 1 else rows.T
        if self.ins > 1:
            return blocks.permute(1, 2, 0).reshape(r, n * r)
        return blocks.permute(2, 1, 0).reshape(n * r, r)
