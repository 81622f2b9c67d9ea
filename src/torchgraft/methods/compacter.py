"""Compacter (Mahabadi, Henderson and Ruder, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers").

arXiv 2106.04647, NeurIPS 2021. An adapter behind the MLP whose two matrices are sums of Kronecker products:

    h <- h + gelu(LN(h) K_d + b_d) K_u + b_u        K = sum_i A_i kron (u_i v_i),   i = 1..n

n = ``phm_dim``, r = ``width``. The rule A (n, n, n) is one tensor for down and up of all layers, stored once; u_i
(d/n, ``rank``) and v_i (``rank``, r/n) belong to the layer. The layout is that of UCSB-AI/PEViT (commit be6fb43), where
the rule stays untrained because a filter on names misses it; here it trains unless ``train_rule=false``.
``sites=[attn, mlp]`` also adapts attention, as the paper's Compacter (what is here by default it calls Compacter++).

Shapes: (..., d) -> (..., d). Parameters per site (rank 1): ``5 d + 3 r``, and ``n^3`` once for the rule; ViT-B/16,
n = 4, r = 64: 48,384 + 64. Not mergeable: an activation stands between the two matrices. Start: v = 0 in K_u, so
the pretrained network (the published code draws it); A is N(0, 1/n), the rest has the variance of Glorot.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.branches import Branch
from ..core.method import Method, register
from ..core.placements import Placement
from ..errors import GraftError
from .forms.adapter_layer import AdapterLayer, NormSide
from .forms.branch_adapters import Sublayer, adapted_branches, behind, channel_axis, check_options


class Rule(nn.Module):
    """The rule A (n, n, n) that every layer shares.

    Shapes: holds (n, n, n). Parameters: ``n^3``, or none where it is not trained.

    Args:
        n: Number of Kronecker products, and side of the matrices of the rule.
        trained: Whether it is a parameter; else a buffer.
    """

    def __init__(self, n: int, *, trained: bool = True) -> None:
        super().__init__()
        values = torch.randn(n, n, n) / math.sqrt(n)
        if trained:
            self.weight = nn.Parameter(values)
        else:
            self.register_buffer("weight", values)


class HypercomplexLinear(nn.Module):
    """``x K + b`` with ``K = sum_i A_i kron (u_i v_i)``, without ever making K.

    Shapes: (..., d_in) -> (..., d_out). Parameters: ``rank (d_in + d_out) + d_out``, and those of the rule.

    Args:
        d_in: Width read; a multiple of n.
        d_out: Width returned; a multiple of n.
        rule: A, shared.
        rank: Rank of the second factors.
        zero: Start at zero: v zero.
    """

    def __init__(self, d_in: int, d_out: int, rule: Rule, *, rank: int = 1, zero: bool = False) -> None:
        super().__init__()
        self.rule = rule
        n = rule.weight.shape[0]
        # With these the entries of K have the variance 2 / (d_in + d_out) of a Glorot matrix.
        std = (2 / (rank * (d_in + d_out))) ** 0.25
        self.u = nn.Parameter(torch.randn(n, d_in // n, rank) * std)
        self.v = nn.Parameter(torch.zeros(n, rank, d_out // n) if zero else torch.randn(n, rank, d_out // n) * std)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        rows = x.unflatten(-1, (self.u.shape[0], -1))
        narrow = torch.einsum("...pa,iar->...pir", rows, self.u)
        turned = torch.einsum("...pir,ipq->...qir", narrow, self.rule.weight)
        return torch.einsum("...qir,irb->...qb", turned, self.v).flatten(-2) + self.bias


@register("compacter")
@dataclasses.dataclass(frozen=True)
class Compacter(Method):
    """Config of Compacter.

    Attributes:
        width: r, a multiple of ``phm_dim``.
        phm_dim: n, which divides the widths of the model.
        rank: Rank of the factors u v.
        sites: Behind which sub-layers.
        act: f.
        layer_norm: A LayerNorm of the adapter: in front, behind, or none.
        train_rule: Whether the shared rule A trains.
    """

    width: int = 64
    phm_dim: int = 4
    rank: int = 1
    sites: tuple[Sublayer, ...] = ("mlp",)
    act: str = "gelu"
    layer_norm: NormSide = "in"
    train_rule: bool = True

    def __post_init__(self) -> None:
        check_options(self.name, width=self.width, act=self.act, sites=self.sites)
        for option in ("phm_dim", "rank"):
            if getattr(self, option) < 1:
                raise GraftError(f"{self.name}: {option}={getattr(self, option)} is not valid; expected at least 1")
        if self.width % self.phm_dim:
            raise GraftError(
                f"{self.name}: phm_dim={self.phm_dim} does not divide width={self.width}; expected a multiple of it"
            )

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One adapter behind every MLP, all with the same rule."""
        found = adapted_branches(anatomy, self.name, self.sites)
        for branch in found:
            self._check_width(anatomy, branch)
        rule = Rule(self.phm_dim, trained=self.train_rule)
        return [behind(anatomy, branch, functools.partial(self._layer, rule)) for branch in found]

    def _check_width(self, anatomy: Anatomy, branch: Branch) -> None:
        d = anatomy.shape(branch.returns)[channel_axis(anatomy, branch)]
        if d % self.phm_dim:
            fitting = [n for n in range(1, 17) if d % n == 0 and self.width % n == 0]
            raise GraftError(
                f"{self.name}: {branch.returns} has {d} channels, which phm_dim={self.phm_dim} does not divide; "
                f"use one of {', '.join(map(str, fitting))}"
            )

    def _layer(self, rule: Rule, d: int, out: int, axis: int) -> AdapterLayer:
        layer = AdapterLayer(d, self.width, out=out, act=self.act, layer_norm=self.layer_norm, axis=axis)
        layer.down = HypercomplexLinear(d, self.width, rule, rank=self.rank)
        layer.up = HypercomplexLinear(self.width, out, rule, rank=self.rank, zero=True)
        return layer
