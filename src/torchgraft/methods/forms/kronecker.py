"""Kronecker products as changes of a linear map (KronA, LoKr) and as a branch of their own (KronA-B).

Row-vector convention, as in the papers: ``y = x (A kron B)`` with A: a1 x a2, B: b1 x b2, x of a1 b1 and y of a2 b2
values. With x seen as a row-major a1 x b1 matrix X this is ``A^T X B``, so nothing of size d x d is ever made.
A layer keeps its weight as (out, in), so there the change is ``(A kron B)^T = A^T kron B^T``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...core.layers import ConvGeometry
from ...core.placements.weight import in_type_of
from ...errors import GraftError
from ...lean.hooks import traces_eagerly
from ...lean.saved import derive
from .pointwise import pixels_read


def kron_apply(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x (A kron B)`` by two small products, in the cheaper order.

    Args:
        x: (..., a1 b1).
        a: (a1, a2).
        b: (b1, b2).

    Returns:
        (..., a2 b2).
    """
    (a1, a2), (b1, b2) = a.shape, b.shape
    rows = x.unflatten(-1, (a1, b1))
    if a1 * b2 * (b1 + a2) <= a2 * b1 * (a1 + b2):
        return (a.T @ _again_if_asked(lambda r: r @ b, rows, b)).flatten(-2)
    return (_again_if_asked(lambda r: a.T @ r, rows, a) @ b).flatten(-2)


def _again_if_asked(product: Callable[[Tensor], Tensor], rows: Tensor, factor: Tensor) -> Tensor:
    """A small product of ``rows``, which are kept for the factor's gradient: the result can be had again from them."""
    made = product(rows)
    if factor.requires_grad and traces_eagerly():
        derive(made, product, rows, (factor,))
    return made


def kron_delta(a: Tensor, b: Tensor) -> Tensor:
    """``(A kron B)^T`` in the layout of a layer's weight.

    Args:
        a: (a1, a2).
        b: (b1, b2), or a kernel (b2, b1, *taps) in the layout of a convolution's weight.

    Returns:
        (a2 b2, a1 b1), or (a2 b2, a1 b1, *taps).
    """
    kernel = b.T if b.dim() == 2 else b
    blocks = a.T.reshape(a.shape[1], 1, a.shape[0], *[1] * (kernel.dim() - 1)) * kernel.unsqueeze(1)
    return blocks.flatten(0, 1).flatten(1, 2)


def balanced_split(inputs: int, outputs: int) -> tuple[int, int]:
    """The shape (a1, a2) of A with the fewest parameters in A and B, and of these the one nearest to a square.

    ``a1 a2`` is as near to sqrt(inputs outputs) as divisors of the two allow; for 768 -> 768 that is (32, 24), with
    B of (24, 32) and 1,536 parameters.
    """
    pairs = [(a1, a2) for a1 in _divisors(inputs) for a2 in _divisors(outputs)]
    total = inputs * outputs
    return min(pairs, key=lambda p: (p[0] * p[1] + total // (p[0] * p[1]), abs(p[0] - p[1]), -p[0]))


class Kronecker(nn.Module):
    """``scale * (A kron B)`` as the change of a weight (arXiv 2212.10650); starts at zero.

    Shapes: weight (a2 b2, a1 b1) or, of a convolution, (a2 b2, a1 b1, *taps); A = ``a`` (a1, a2), Kaiming-uniform with
    a = sqrt(5); B = ``b`` (b1, b2) or a kernel (b2, b1, *taps), zero. Of a transposed convolution, which keeps its
    inputs first, "out" and "in" change places.
    Parameters: ``a1 a2 + b1 b2 taps``.

    Args:
        shape: Shape of the weight, or of the rows that change.
        a_shape: (a1, a2); None: :func:`balanced_split`.
        scale: s.

    Raises:
        GraftError: ``a_shape`` does not divide the weight.
    """

    def __init__(self, shape: Sequence[int], a_shape: tuple[int, int] | None = None, scale: float = 1.0) -> None:
        super().__init__()
        outputs, inputs, *taps = shape
        a1, a2 = a_shape or balanced_split(inputs, outputs)
        if a1 < 1 or a2 < 1 or inputs % a1 or outputs % a2:
            raise GraftError(
                f"a_shape=[{a1}, {a2}] does not divide a weight of {inputs} inputs and {outputs} outputs; expected a "
                f"divisor of each, such as {list(balanced_split(inputs, outputs))}"
            )
        b1, b2 = inputs // a1, outputs // a2
        self.a = nn.Parameter(torch.empty(a1, a2))
        self.b = nn.Parameter(torch.zeros((b2, b1, *taps) if taps else (b1, b2)))
        self.scale = scale
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """The change, in the shape of the weight."""
        return self.scale * kron_delta(self.a, self.b)

    def along(self, x: Tensor, geometry: ConvGeometry | None) -> Tensor:
        """What the change makes of an input (..., in), or (N, in, *space)."""
        x = in_type_of(x, self.a)
        if geometry is None:
            return self.scale * kron_apply(x, self.a, self.b)
        if geometry.transposed:
            return geometry.apply(x, self(), 1)
        pixels = pixels_read(x, geometry)
        if pixels is not None:
            return self.scale * kron_apply(pixels, self.a, self.b.flatten(1).T).movedim(-1, 1)
        a1, n = self.a.shape[0], x.shape[0]
        maps = geometry.apply(x.unflatten(1, (a1, -1)).flatten(0, 1), self.b, 1).unflatten(0, (n, a1))
        return self.scale * torch.einsum("ij,ni...->nj...", self.a, maps).flatten(1, 2)


class KroneckerBranch(Kronecker):
    """``scale * n (A kron B)``, or with a residual ``scale * n (A kron B) + s_res * n``: a branch beside an MLP.

    Shapes: (..., d) -> (..., d); with ``axis=1`` (N, d, *space) -> (N, d, *space).
    Parameters: ``a1 a2 + b1 b2``, one more with a residual (s_res = ``residual_scale``).

    Args:
        d: Width.
        a_shape: (a1, a2); None: :func:`balanced_split`.
        scale: s.
        residual: Start of s_res; None: no residual.
        axis: The axis that holds the d features: -1, or 1 on maps.
    """

    residual_scale: nn.Parameter | None

    def __init__(
        self,
        d: int,
        a_shape: tuple[int, int] | None = None,
        scale: float = 1.0,
        *,
        residual: float | None = None,
        axis: int = -1,
    ) -> None:
        super().__init__((d, d), a_shape, scale)
        self.axis = axis
        start = None if residual is None else nn.Parameter(torch.full((), float(residual)))
        self.register_parameter("residual_scale", start)

    def forward(self, n: Tensor) -> Tensor:  # type: ignore[override]
        """The branch's output for its input."""
        y = self.along(n.movedim(self.axis, -1), None).movedim(-1, self.axis)
        return y if self.residual_scale is None else y + self.residual_scale * n


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
