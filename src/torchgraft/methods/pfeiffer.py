"""Pfeiffer adapters (Pfeiffer et al., "AdapterFusion", arXiv 2005.00247, EACL 2021): one bottleneck per block.

    reads="output"    m <- m + f(m W_d + b_d) W_u + b_u              m: what fc2 returns

This is the form in which vision papers count it. The published one reads the sum instead (x: the residual stream,
f: the whole bottleneck), which in post-norm blocks uses the frozen norm twice (arXiv 2110.04366, RoBERTa):

    reads="sum"       u = x + m          out = u + f(u)              pre-norm: ViT, T5, mBART
                      u = LN(x + m)      out = LN(x + m + f(u))      post-norm: BERT, RoBERTa, BART

Shapes: (..., d) -> (..., d). Parameters per block: ``2 r d + r + d`` with r = ``width``; ViT-B/16, r = 8: 156,768.
Not mergeable: an activation stands between the two layers. Start: W_u = 0, so the pretrained network
(``init="bert"``: N(0, 0.02)).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

from ..core.anatomy import Anatomy
from ..core.branches import Branch
from ..core.graft import Args, Kwargs, first_tensor
from ..core.layers import is_norm
from ..core.method import Method, register
from ..core.placements import Hook, Placement, Point, Sequential
from ..errors import GraftError
from .forms.adapter_layer import AdapterLayer, NormSide, Start
from .forms.branch_adapters import adapted_branches, behind, check_options, sequential


class AroundNorm(Sequential):
    """``norm(h + form(norm(h)))`` at a frozen norm with the input h."""

    def hooks(self) -> list[Hook]:
        """One action in place of the norm."""
        return [Hook(self.home, "around", self)]

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """The norm twice."""
        h = first_tensor(args, kwargs)
        return forward(h + self.form(forward(h)))


@register("pfeiffer")
@dataclasses.dataclass(frozen=True)
class Pfeiffer(Method):
    """Config of the adapters of Pfeiffer et al.

    Attributes:
        width: r.
        reads: What the bottleneck reads: the MLP's output, or its sum with the residual stream, as published.
        act: f.
        dropout: Behind f, in training.
        layer_norm: A LayerNorm of the adapter: in front, behind, or none.
        init: ``"lora"``: the network starts as the pretrained one; ``"bert"``: N(0, 0.02), so not quite.
    """

    width: int = 8
    reads: Literal["output", "sum"] = "output"
    act: str = "relu"
    dropout: float = 0.0
    layer_norm: NormSide = "none"
    init: Start = "lora"

    def __post_init__(self) -> None:
        check_options(self.name, width=self.width, act=self.act)

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One bottleneck behind every MLP."""
        found = adapted_branches(anatomy, self.name, ["mlp"])
        return [self._behind_sum(anatomy, b) if self.reads == "sum" else behind(anatomy, b, self._layer) for b in found]

    def _layer(self, d: int, out: int, axis: int) -> AdapterLayer:
        return AdapterLayer(
            d,
            self.width,
            out=out,
            act=self.act,
            layer_norm=self.layer_norm,
            dropout=self.dropout,
            init=self.init,
            axis=axis,
        )

    def _behind_sum(self, anatomy: Anatomy, branch: Branch) -> Placement:
        norm = _norm_of_sum(anatomy, branch)
        if norm is not None:
            width = anatomy.shape(norm)[-1]
            return AroundNorm(self._layer(width, width, -1), norm)
        if (count := anatomy.calls(branch.last)) > 1:
            raise GraftError(
                f"{self.name}: {branch.last!r} is called {count} times in one forward, so no single sum stands behind "
                f"it; use reads=output, or exclude={branch.block!r}"
            )
        total = _sum(branch)
        first = len(anatomy.shape(total)) > 3 and anatomy.layout(total).name == "NC..."
        return sequential(anatomy, total, 1 if first else -1, self._layer)


def _norm_of_sum(anatomy: Anatomy, branch: Branch) -> Point | None:
    """The norm with which a post-norm block ends, right behind the branch.

    A module that is called twice may also have run last, as the DropPath behind the norms of transformers' Swin V2.
    """
    assert anatomy.trace is not None
    calls, last = anatomy.trace.calls, branch.adds.path
    inside = [p for p in calls if p.startswith(f"{branch.block}.")]
    behind_branch = [p for p in inside if calls[p].order > calls[last].order and not last.startswith(f"{p}.")]
    unclear = any(calls[p].count > 1 for p in inside)
    if branch.pre_norm or unclear or len(behind_branch) != 1 or not is_norm(anatomy.module(behind_branch[0])):
        return None
    return Point(behind_branch[0], "output")


def _sum(branch: Branch) -> Point:
    """What the smallest module around norm and branch returns: the block, or a part of it (T5, MaxViT)."""
    if branch.norm is None:
        return Point(branch.block, "output")
    pairs = zip(branch.norm.split("."), branch.adds.path.split("."), strict=False)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return Point(".".join(name for name, _ in shared), "output")
