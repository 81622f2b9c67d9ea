"""Conv-Adapter (Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets").

arXiv 2208.07463, CVPR 2024 workshop "Prompting in Vision". Beside a frozen K x K convolution C runs a
bottleneck A with the same receptive field and output size (gamma = ``reduction``, alpha per channel):

    A(u) = alpha * W2 act(W1 u)        W1: K x K, width = C_in / gamma groups; W2: 1 x 1

    conv-parallel        C(u) + A(u)                  residual-parallel      y + A(x)
    conv-sequential      v + A(v),  v = C(u)          residual-sequential    y + A(y)

with x and y the input and output of the block. Inverted residuals (EfficientNet and kin) take the residual
form in the published code, transformer blocks a branch from the norm before the attention to the residual
sum behind it, on the token grid.

Parameters per site: ``K K C_in + C_in/gamma + C_in C_out/gamma + 2 C_out``. Published: 3.5 % of full
fine-tuning on ResNet-50 (abstract). Not mergeable: an activation stands between the two convolutions.
Start: W2 = 0 (ours) or as the official code (``init="official"``, alpha = 1, so not an identity).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..core.anatomy import Anatomy, Site
from ..core.layers import ACTIVATIONS, is_conv, is_norm
from ..core.method import Method, register
from ..core.placements import Placement, Point
from ..errors import GraftError, nearest
from .forms.before_pooling import norm_before_pooling
from .forms.conv_adapter_official import (
    beside_pooling,
    is_resnet,
    named_norms,
    official_source,
    official_start,
)
from .forms.conv_bottleneck import Init
from .forms.conv_sites import ConvSites
from .forms.copies import copies

INVERTED = [
    "InvertedResidual",
    "DepthwiseSeparableConv",
    "EdgeResidual",
    "ConvBnAct",
    "CondConvResidual",
    "UniversalInvertedResidual",
    "MBConv",
    "FusedMBConv",
    "MbConvBlock",
    "GhostBottleneck",
]
"""Block classes whose published form is residual-parallel."""

POINTWISE = ["InvertedResidual", "DepthwiseSeparableConv", "CondConvResidual", "UniversalInvertedResidual"]
"""Those among them whose published kernel is 1."""

Scheme = Literal["auto", "conv-parallel", "conv-sequential", "residual-parallel", "residual-sequential"]


@register("conv-adapter")
@dataclasses.dataclass(frozen=True)
class ConvAdapter(Method):
    """Config of Conv-Adapter.

    Attributes:
        scheme: Where the bottleneck goes; ``"auto"``: residual-parallel on inverted residuals, else
            conv-parallel (attention-parallel on transformer blocks).
        reduction: gamma; the width is the largest divisor of C_in that is at most C_in / gamma. ``"auto"``: 4,
            and 2 on networks of inverted residuals, where C_in is the narrow side.
        kernel: ``"match"``: that of the adapted convolution; ``"official"``: 1 on inverted residuals, as
            published; or a number. ``"auto"``: match, or what ``preset`` says.
        add_point: ``"conv"``: added to the convolution's output; ``"post-act"``: after norm and activation,
            as in the published ResNet; ``"auto"``: conv, or what ``preset`` says.
        downsample: Also adapt the K x K convolutions between stages (ConvNeXt).
        norms: Also train ``"all"`` norms, or (true) the LayerNorms and the final norm, which the published code
            finds by name. ``"auto"``: all on networks of inverted residuals, whose wide middle no bottleneck reaches,
            as long as ``reduction``, ``kernel`` and ``scheme`` are left to auto too; else none.
        init: ``"zero"``: the network starts as the pretrained one; ``"official"``: as published.
        act: Activation; ``"auto"``: that of the block.
        preset: ``"official"``: everything as the published code has it for the backbone at hand (symmetric
            padding, kernel 1 on inverted residuals, official start, norms trained, post-activation sum and an
            extra BatchNorm before pooling on ResNet, a linear bottleneck beside CLIP's attention pooling).
    """

    scheme: Scheme = "auto"
    reduction: float | Literal["auto"] = "auto"
    kernel: Literal["auto", "match", "official"] | int = "auto"
    add_point: Literal["auto", "conv", "post-act"] = "auto"
    downsample: bool = True
    norms: bool | Literal["auto", "all"] = "auto"
    init: Literal["zero", "official"] = "zero"
    act: str = "auto"
    preset: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.reduction != "auto" and self.reduction < 1:
            raise GraftError(f"conv-adapter: reduction={self.reduction} is not valid; expected at least 1")
        if isinstance(self.kernel, int) and self.kernel < 1:
            raise GraftError(f"conv-adapter: kernel={self.kernel} is not valid; expected at least 1")
        if self.act != "auto" and self.act not in ACTIVATIONS:
            raise GraftError(f"conv-adapter: act={self.act!r}; {nearest(self.act, [*ACTIVATIONS, 'auto'])}")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One bottleneck per block (or per spatial convolution where there are no blocks)."""
        if anatomy.stem is None or not is_conv(anatomy.module(anatomy.stem)):
            raise GraftError(
                f"conv-adapter: {type(anatomy.model).__name__} reads no image (its first layer is no convolution), "
                "so there is no spatial grid to convolve over; use a method for token models"
            )
        placed: list[Placement] = []
        blocks = anatomy.find("block")
        adapted = {s.block for s in anatomy.find("spatial_conv", "block", "attn") if s.block}
        for block in blocks:
            placed += self._in_block(anatomy, block)
        whole = {s.path for s in blocks}
        for site in anatomy.find("spatial_conv"):
            if site.block is None or site.block not in whole:
                sequential = self.scheme.endswith("sequential")
                placed.append(self._at_conv(anatomy, site, "conv-sequential" if sequential else "conv-parallel"))
        if self.downsample:
            placed += [self._at_conv(anatomy, s, "conv-parallel") for s in anatomy.find("downsample")
                       if not anatomy.selection.explicit(s.path, s.address)]  # fmt: skip
        if not placed:
            raise GraftError(
                f"conv-adapter: no site on {type(anatomy.model).__name__}: no block and no convolution with a kernel "
                "larger than 1 is selected; see `torchgraft list sites`"
            )
        if self.norms == "all" or (self.norms == "auto" and self._left_to_us and self._narrow(anatomy)):
            placed += copies(anatomy, lambda path, module, name: is_norm(module))
        elif self.norms is True or self._official:
            placed += named_norms(anatomy, adapted)
        if self._official:
            placed += beside_pooling(anatomy, self._gamma(anatomy))
        if self._official and is_resnet(anatomy):
            placed.append(norm_before_pooling(anatomy))
        return placed

    def _in_block(self, anatomy: Anatomy, block: Site) -> list[Placement]:
        scheme = self.scheme
        if scheme == "auto":
            scheme = "residual-parallel" if block.kind in INVERTED else "conv-parallel"
        sites = self._sites(anatomy, self._block_kernel(block))
        if scheme.startswith("residual"):
            return [sites.around_block(block, sequential=scheme.endswith("sequential"))]
        if convs := anatomy.inside(block.path, "spatial_conv"):
            return [self._at_conv(anatomy, s, scheme) for s in convs if anatomy.selection(s.path, s.address)]
        beside = sites.beside_attention(block) if anatomy.inside(block.path, "attn") else None
        return [beside or sites.around_block(block)]

    def _at_conv(self, anatomy: Anatomy, site: Site, scheme: str) -> Placement:
        sites = self._sites(anatomy, self.kernel if isinstance(self.kernel, int) else None)
        output = Point(site.path, "output")
        if self._add_point(anatomy) == "post-act" and site.role == "spatial_conv":
            output = sites.behind_activation(site)
        if scheme == "conv-sequential":
            return sites.behind_conv(site, output)
        source = official_source(anatomy, site) if self._official else Point(site.path, "input")
        return sites.beside_conv(site, source, output)

    def _sites(self, anatomy: Anatomy, kernel: int | None) -> ConvSites:
        start: Init = official_start(anatomy) if self.init == "official" or self._official else "zero"
        return ConvSites(anatomy, self._gamma(anatomy), self.act, start, kernel, symmetric=self._official)

    def _gamma(self, anatomy: Anatomy) -> float:
        if self.reduction != "auto":
            return self.reduction
        return 2 if self._left_to_us and self._narrow(anatomy) else 4

    @property
    def _left_to_us(self) -> bool:
        """Whether the config names no part of the published form; then a study chose (docs/decisions/0006)."""
        return self.reduction == self.kernel == self.scheme == "auto" and not self._official

    @staticmethod
    def _narrow(anatomy: Anatomy) -> bool:
        """Whether most blocks are inverted residuals, whose ends, where the bottlenecks stand, are narrow."""
        return 2 * sum(block.name in INVERTED for block in anatomy.blocks) > len(anatomy.blocks)

    def _block_kernel(self, block: Site) -> int | None:
        if isinstance(self.kernel, int):
            return self.kernel
        published = self.kernel == "official" or (self.kernel == "auto" and self._official)
        return 1 if published and block.kind in POINTWISE else None

    def _add_point(self, anatomy: Anatomy) -> str:
        if self.add_point != "auto":
            return self.add_point
        return "post-act" if self._official and is_resnet(anatomy) else "conv"

    @property
    def _official(self) -> bool:
        return self.preset == "official"
