"""KAdaptation (He et al., "Parameter-efficient Model Adaptation for Vision Transformers", arXiv 2203.16329).

The change of a projection is a sum of n Kronecker products of small matrices: "slow" ones A_i that all layers share,
and "fast" ones of rank r per layer. Row-vector convention, s = ``scale``:

    y <- y + s x H + delta_bias       H = sum_{i=1..n} A_i kron (u_i v_i)          d_in x d_out
    A_i = p_i q_i                     p = ``slow_left`` (n, n, k), q = ``slow_right`` (n, k, n), k = ``slow_rank``
    u_i (d_in / n, r) in ``u``        v_i (r, d_out / n) in ``v``

With factored A_i the sum is one product of rank n k r, ``H = [p_i kron u_i] [q_i kron v_i]``, and is computed so;
``slow_rank=null`` has full A_i = ``slow`` (n, n, n). One A per part (q, v, ...) and number of inputs.

Start: p, q uniform in +-0.01 as released, u normal with std 1/sqrt(d_in / n), v zero: the pretrained network. (The
released code starts u and v at zero, so that neither ever gets a gradient.) Entries of A near 1e-4 are what the large
s = 160 is for.

Parameters: r (d_in + d_out) per weight, 2 n^2 k (or n^3) per A, and d_out with ``delta_bias``. ViT-B/16 with q and v:
40,960, with ``delta_bias`` 59,392. (Published for ViT-B/32 with a head: 79,699, of which 50,176 in the network: there
q and v share one bias.) Merged as W + s H^T and b + delta_bias.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.layers import ConvGeometry
from ..core.method import Method, register
from ..core.placements import Placement, WeightDelta
from ..core.placements.weight import in_type_of
from ..errors import GraftError
from .forms.low_rank import along_conv
from .forms.pointwise import pixels_read
from .forms.targets import Part, Weight, nothing_found, weights


@register("kadaptation")
@dataclasses.dataclass(frozen=True)
class KAdaptation(Method):
    """Config of KAdaptation.

    Attributes:
        n: Number of products, and size of the slow matrices; divides the inputs and outputs of every weight. With
            ``targets=auto`` weights that it does not divide are left out.
        rank: r of the fast matrices.
        slow_rank: Rank of the slow matrices; null: full ones.
        scale: s.
        delta_bias: Also change the biases of these weights; refused where a layer has none.
        targets: Which weights: names of parts of a block (see :func:`torchgraft.methods.forms.targets.weights`);
            ``"auto"``: queries and values, on models without attention every weight of the blocks.
    """

    n: int = 32
    rank: int = 1
    slow_rank: int | None = 1
    scale: float = 160.0
    delta_bias: bool = False
    targets: Part | tuple[Part, ...] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        for option in ("n", "rank", "slow_rank"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise GraftError(f"{self.name}: {option}={value} is not valid; expected at least 1")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One sum of products per weight, with the slow matrices shared by weights of one part and width."""
        found = weights(anatomy, self.targets, self.name)
        if not found:
            raise nothing_found(anatomy, self.targets, self.name)
        slow: dict[object, tuple[nn.Parameter, ...]] = {}
        placed: list[Placement] = []
        for weight in self._divisible(anatomy, found):
            shape = tuple(weight.value(anatomy).shape)
            part = weight.part if weight.part != "delta" else anatomy.site(weight.path).role.removeprefix("attn.")
            key = part, math.prod(shape[1:])
            if key not in slow:
                slow[key] = slow_matrices(self.n, self.slow_rank)
            form = KroneckerSum(shape, slow[key], self.rank, self.scale)
            placed.append(weight.delta(anatomy, form))
            if self.delta_bias:
                placed.append(self._bias(anatomy.module(weight.path), weight, shape[0]))
        return placed

    def _bias(self, module: nn.Module, weight: Weight, size: int) -> Placement:
        name, rows = "bias", weight.rows
        if isinstance(module, nn.MultiheadAttention):
            name = "in_proj_bias"
            if rows is None and weight.part in ("q", "k", "v"):
                first = "qkv".index(weight.part) * size
                rows = slice(first, first + size)
        if module._parameters.get(name) is None:
            raise GraftError(f"{self.name}: {weight.path!r} has no bias to change; use delta_bias=false, or exclude it")
        slot = "bias" if weight.part == "delta" else f"{weight.part}_bias"
        return WeightDelta(weight.path, Shift(size), parameter=name, rows=rows, slot=slot)

    def _divisible(self, anatomy: Anatomy, chosen: list[Weight]) -> list[Weight]:
        """The weights whose inputs and outputs are multiples of n: all of them, unless the method chose them itself."""
        shapes = [weight.value(anatomy).shape for weight in chosen]
        common = math.gcd(*(size for shape in shapes for size in (shape[0], math.prod(shape[1:]))))
        fits = [s[0] % self.n == 0 and math.prod(s[1:]) % self.n == 0 for s in shapes]
        kept = [w for w, fit in zip(chosen, fits, strict=True) if fit]
        if not all(fits) and (self.targets != "auto" or not kept):
            i = fits.index(False)
            outputs, inputs = shapes[i][0], math.prod(shapes[i][1:])
            raise GraftError(
                f"{self.name}: n={self.n} does not divide the weight of {chosen[i].path!r} ({inputs} inputs, {outputs} "
                f"outputs); use a divisor of {common}, which divides all that are selected, or name other targets"
            )
        return kept


class KroneckerSum(nn.Module):
    """``scale * (sum_i A_i kron (u_i v_i))^T`` as the change of a weight; starts at zero.

    The weight is read as a matrix (first axis, all others).

    Shapes: A as ``slow_left`` (n, n, k) and ``slow_right`` (n, k, n), or ``slow`` (n, n, n); ``u`` (n, d_in / n, r),
    ``v`` (n, r, d_out / n).
    Parameters: ``r (d_in + d_out)``, and the shared A.

    Args:
        shape: Shape of the weight, or of the rows that change.
        slow: What :func:`slow_matrices` returned; the very parameters are kept.
        rank: r.
        scale: s.
    """

    slow: nn.Parameter
    slow_left: nn.Parameter
    slow_right: nn.Parameter

    def __init__(self, shape: tuple[int, ...], slow: tuple[nn.Parameter, ...], rank: int, scale: float) -> None:
        super().__init__()
        self.shape, self.scale, n = tuple(shape), scale, slow[0].shape[0]
        names = ("slow",) if len(slow) == 1 else ("slow_left", "slow_right")
        for name, parameter in zip(names, slow, strict=True):
            self.register_parameter(name, parameter)
        self.factored = len(slow) == 2
        self.u = nn.Parameter(torch.empty(n, math.prod(shape[1:]) // n, rank))
        self.v = nn.Parameter(torch.zeros(n, rank, shape[0] // n))
        nn.init.normal_(self.u, std=self.u.shape[1] ** -0.5)

    def forward(self) -> Tensor:
        """The change, in the shape of the weight."""
        if self.factored:
            down, up = self._product()
            return (self.scale * up @ down).view(self.shape)
        delta = torch.einsum("iab,ipr,irq->bqap", self.slow, self.u, self.v)
        return (self.scale * delta).reshape(self.shape)

    def along(self, x: Tensor, geometry: ConvGeometry | None) -> Tensor:
        """What the change makes of an input (..., in), or (N, in, *space)."""
        x = in_type_of(x, self.u)
        if self.factored:
            down, up = self._product()
            features = x if geometry is None else pixels_read(x, geometry)
            if features is None:
                assert geometry is not None
                return along_conv(x, down, up, self.shape, geometry, self.scale)
            y = self.scale * F.linear(F.linear(features, down), up)
            return y if geometry is None else y.movedim(-1, 1)
        if geometry is not None:
            return geometry.apply(x, self(), 1)
        code = torch.einsum("...ap,ipr->...air", x.unflatten(-1, (self.u.shape[0], -1)), self.u)
        mixed = torch.einsum("...air,iab->...bir", code, self.slow)
        return self.scale * torch.einsum("...bir,irq->...bq", mixed, self.v).flatten(-2)

    def _product(self) -> tuple[Tensor, Tensor]:
        """The two factors of H^T: (n k r, d_in) and (d_out, n k r)."""
        left, right = self.slow_left, self.slow_right
        down = torch.einsum("iak,ipr->ikrap", left, self.u).flatten(3).flatten(0, 2)
        up = torch.einsum("ikb,irq->bqikr", right, self.v).flatten(2).flatten(0, 1)
        return down, up


class Shift(nn.Module):
    """A learned change of a bias: ``delta_bias`` (size,), zero at the start."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.delta_bias = nn.Parameter(torch.zeros(size))

    def forward(self) -> Tensor:
        """The change (size,)."""
        return self.delta_bias


def slow_matrices(n: int, rank: int | None) -> tuple[nn.Parameter, ...]:
    """The slow matrices that several weights share: p (n, n, rank) and q (n, rank, n), or A (n, n, n) alone."""
    shapes = [(n, n, n)] if rank is None else [(n, n, rank), (n, rank, n)]
    return tuple(nn.Parameter(nn.init.uniform_(torch.empty(s), -0.01, 0.01)) for s in shapes)
