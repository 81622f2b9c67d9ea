"""Parallel adapters and scaled parallel adapters (He et al., "Towards a Unified View of Parameter-Efficient
Transfer Learning", arXiv 2110.04366, ICLR 2022): the adapter beside the sub-layer instead of behind it.

    MLP          m <- m + s (relu(x W_d + b_d) W_u + b_u)           m: what the MLP adds to the residual stream
    attention    o <- o + s (relu(LN(x) W_d + b_d) W_u + b_u)       o: the concatenated heads in front of W_o

with r = ``width``, s = ``scale`` (1; 4 in the scaled form, also learned). x at the MLP is the residual stream in front
of the norm (``pre_norm``, mBART and AdaptFormer) or what the norm returns (``post_norm``); in post-norm blocks
(BERT, BART) these are the same. At attention x is what its projections read, and the LayerNorm the adapter's own.

Shapes: (..., d) -> (..., d). Parameters per MLP: ``2 r d + r + d``; ViT-B/16: 156,768 (r = 8), 304,320 (r = 16).
Not mergeable: there is an activation. Start: W_u = 0, so the pretrained network; the paper recommends this for the
scaled form and has N(0, 0.02) for the other (``init="bert"``).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..core.anatomy import Anatomy
from ..core.branches import Branch
from ..core.layers import in_channels
from ..core.method import Method, register
from ..core.placements import Parallel, Placement, Point
from ..errors import GraftError
from .forms.adapter_layer import AdapterLayer, NormSide, Start
from .forms.branch_adapters import AdapterInput, Sublayer, adapted_branches, beside, channel_axis, check_options


@register("parallel-adapter")
@dataclasses.dataclass(frozen=True)
class ParallelAdapter(Method):
    """Config of the parallel adapter.

    Attributes:
        width: r.
        scale: s; ``"learned"``: one number per adapter that starts at 1.
        sites: Beside which sub-layers.
        adapter_input: What the MLP's adapter reads: the stream in front of the norm or behind it.
        act: f.
        dropout: Behind f, in training.
        attn_layer_norm: A LayerNorm of the attention adapters: in front, behind, or none.
        mlp_layer_norm: Likewise of the MLP adapters.
        init: ``"lora"``: the network starts as the pretrained one; ``"bert"``: N(0, 0.02), so not quite.
    """

    width: int = 8
    scale: float | Literal["learned"] = 1.0
    sites: tuple[Sublayer, ...] = ("mlp",)
    adapter_input: AdapterInput = "pre_norm"
    act: str = "relu"
    dropout: float = 0.0
    attn_layer_norm: NormSide = "in"
    mlp_layer_norm: NormSide = "none"
    init: Start = "lora"

    def __post_init__(self) -> None:
        check_options(self.name, width=self.width, act=self.act, sites=self.sites)

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One bottleneck beside every MLP and, if asked for, every attention."""
        return [
            beside(anatomy, branch, self._layer, self.adapter_input)
            if branch.kind == "mlp"
            else self._beside_heads(anatomy, branch)
            for branch in adapted_branches(anatomy, self.name, self.sites)
        ]

    def _beside_heads(self, anatomy: Anatomy, branch: Branch) -> Placement:
        source, target = Point(branch.module or branch.block, "input"), Point(branch.last, "input")
        out = in_channels(anatomy.module(branch.last))
        if branch.last == branch.module or anatomy.calls(branch.last) == 0 or out is None:
            raise GraftError(
                f"{self.name}: attention {branch.module!r} never calls its output projection as a module, so nothing "
                "can be added to its heads; use sites=[mlp]"
            )
        axis = channel_axis(anatomy, branch)
        return Parallel(self._form(self.attn_layer_norm, anatomy.shape(source)[axis], out, axis), source, target)

    def _layer(self, d: int, out: int, axis: int) -> AdapterLayer:
        return self._form(self.mlp_layer_norm, d, out, axis)

    def _form(self, norm: NormSide, d: int, out: int, axis: int) -> AdapterLayer:
        return AdapterLayer(
            d,
            self.width,
            out=out,
            act=self.act,
            layer_norm=norm,
            scale=self.scale,
            dropout=self.dropout,
            init=self.init,
            axis=axis,
        )


@register("scaled-parallel-adapter")
@dataclasses.dataclass(frozen=True)
class ScaledParallelAdapter(ParallelAdapter):
    """Config of the scaled parallel adapter: the parallel adapter with the paper's scale and width for it.

    Attributes:
        width: r.
        scale: s, 4 in the paper's translation and summarisation, 2 in its GLUE script.
    """

    width: int = 16
    scale: float | Literal["learned"] = 4.0
