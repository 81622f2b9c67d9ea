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

from torch import nn

from ..core.anatomy import Anatomy, Site
from ..core.blocks import class_name
from ..core.layers import (
    ACTIVATIONS,
    ConvGeometry,
    activation_like,
    in_channels,
    is_batchnorm,
    is_conv,
    is_norm,
    out_channels,
)
from ..core.method import Method, register
from ..core.placements import Parallel, Placement, Point, Sequential, Train
from ..errors import GraftError, nearest
from .forms.before_pooling import block_family, norm_before_pooling
from .forms.conv_bottleneck import ConvBottleneck, Init, bottleneck_width
from .forms.linear_bottleneck import LinearBottleneck

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

Scheme = Literal["auto", "conv-parallel", "conv-sequential", "residual-parallel", "residual-sequential"]


@register("conv-adapter")
@dataclasses.dataclass(frozen=True)
class ConvAdapter(Method):
    """Config of Conv-Adapter.

    Attributes:
        scheme: Where the bottleneck goes; ``"auto"``: residual-parallel on inverted residuals, else
            conv-parallel (attention-parallel on transformer blocks).
        reduction: gamma; the width is the largest divisor of C_in that is at most C_in / gamma.
        kernel: ``"match"``: that of the adapted convolution; ``"official"``: 1 on inverted residuals, as
            published; or a number. ``"auto"``: match, or what ``preset`` says.
        add_point: ``"conv"``: added to the convolution's output; ``"post-act"``: after norm and activation,
            as in the published ResNet; ``"auto"``: conv, or what ``preset`` says.
        downsample: Also adapt the K x K convolutions between stages (ConvNeXt).
        norms: Also train the LayerNorms and the final norm, as the published code does by name.
        init: ``"zero"``: the network starts as the pretrained one; ``"official"``: as published.
        act: Activation; ``"auto"``: that of the block.
        preset: ``"official"``: everything as the published code has it for the backbone at hand (symmetric
            padding, kernel 1 on inverted residuals, official start, norms trained, post-activation sum and an
            extra BatchNorm before pooling on ResNet, a linear bottleneck beside CLIP's attention pooling).
    """

    scheme: Scheme = "auto"
    reduction: float = 4
    kernel: Literal["auto", "match", "official"] | int = "auto"
    add_point: Literal["auto", "conv", "post-act"] = "auto"
    downsample: bool = True
    norms: bool = False
    init: Literal["zero", "official"] = "zero"
    act: str = "auto"
    preset: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.reduction < 1:
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
        adapted = {s.block for s in anatomy.find("spatial_conv", "block", "attn") if s.block}
        for block in anatomy.find("block"):
            placed += self._in_block(anatomy, block)
        whole = {s.path for s in anatomy.find("block")}
        for site in anatomy.find("spatial_conv"):
            if site.block is None or site.block not in whole:
                placed.append(self._at_conv(anatomy, site, self._conv_scheme()))
        if self.downsample:
            placed += [self._at_conv(anatomy, s, "conv-parallel") for s in anatomy.find("downsample")
                       if not anatomy.selection.explicit(s.path, s.address)]  # fmt: skip
        if not placed:
            raise GraftError(
                f"conv-adapter: no site on {type(anatomy.model).__name__}: no block and no convolution with a kernel "
                "larger than 1 is selected; see `torchgraft list sites`"
            )
        if self.norms or self._official:
            placed += self._norms(anatomy, adapted)
        if self._official:
            placed += self._beside_pooling(anatomy)
        if self._official and _is_resnet(anatomy):
            placed.append(norm_before_pooling(anatomy))
        return placed

    # -- one site ---------------------------------------------------------------------------------------

    def _in_block(self, anatomy: Anatomy, block: Site) -> list[Placement]:
        convs = anatomy.inside(block.path, "spatial_conv")
        scheme = self.scheme
        if scheme == "auto":
            scheme = "residual-parallel" if block.kind in INVERTED else "conv-parallel"
        if scheme.startswith("residual"):
            return [self._around_block(anatomy, block, scheme)]
        if convs:
            chosen = [s for s in convs if anatomy.selection(s.path, s.address)]
            return [self._at_conv(anatomy, s, scheme) for s in chosen]
        if anatomy.inside(block.path, "attn"):
            beside = self._beside_attention(anatomy, block)
            if beside is not None:
                return [beside]
        return [self._around_block(anatomy, block, "residual-parallel")]

    def _at_conv(self, anatomy: Anatomy, site: Site, scheme: str) -> Placement:
        conv = anatomy.module(site.path)
        geometry = ConvGeometry.of(conv)
        assert site.in_channels is not None and site.out_channels is not None
        if isinstance(self.kernel, int):
            geometry = geometry.with_kernel(self.kernel)
        output = Point(site.path, "output")
        if self._add_point(anatomy) == "post-act" and site.role == "spatial_conv":
            output = self._post_act(anatomy, site)
        if scheme == "conv-sequential":
            kernel = geometry.kernel if len(set(geometry.kernel)) > 1 else geometry.kernel[0]
            form = self._form(anatomy, site, site.out_channels, site.out_channels,
                              ConvGeometry.keeping_size(geometry.dims, kernel))  # fmt: skip
            return Sequential(form, output)
        form = self._form(anatomy, site, site.in_channels, site.out_channels, geometry)
        return Parallel(form, self._source(anatomy, site), output)

    def _around_block(self, anatomy: Anatomy, block: Site, scheme: str) -> Placement:
        before, after = Point(block.path, "input"), Point(block.path, "output")
        layout, out_layout = anatomy.layout(before), anatomy.layout(after)
        geometry = self._block_geometry(anatomy, block, strided=scheme == "residual-parallel")
        width, out_width = anatomy.channels(before, layout), anatomy.channels(after, out_layout)
        if scheme == "residual-sequential":
            form = self._form(anatomy, block, out_width, out_width, geometry)
            return Sequential(form, after, layout=out_layout)
        form = self._form(anatomy, block, width, out_width, geometry)
        return Parallel(form, before, after, layout=layout, out_layout=out_layout, early=True)

    def _beside_attention(self, anatomy: Anatomy, block: Site) -> Placement | None:
        """From the norm before the attention to the residual sum, outside DropPath and LayerScale."""
        attention = anatomy.inside(block.path, "attn")[0]
        norm = _norm_before(anatomy, block, attention)
        if norm is None or anatomy.trace is None:
            return None
        source = Point(norm.path, "output")
        shape = anatomy.shape(source)
        names = ("drop_path1", "drop_path", "ls1", "layer_scale1", "dropout")
        candidates = [f"{block.path}.{n}" for n in names] + [attention.path]
        start = anatomy.trace.calls[norm.path].order
        for path in candidates:
            call = anatomy.trace.calls.get(path)
            if call is not None and call.count == 1 and call.order > start and call.output == shape:
                layout = anatomy.layout(source)
                width = anatomy.channels(source, layout)
                kernel = self.kernel if isinstance(self.kernel, int) else (7 if "Swin" in block.kind else 3)
                form = self._form(anatomy, block, width, width, ConvGeometry.keeping_size(2, kernel))
                return Parallel(form, source, Point(path, "output"), layout=layout)
        return None

    def _source(self, anatomy: Anatomy, site: Site) -> Point:
        """The convolution's input; on BiT, as published, the raw output of conv1, before its norm and activation."""
        if self._official and block_family(anatomy) == "resnetv2" and site.block is not None:
            before = f"{site.block}.conv1"
            if before != site.path and before in anatomy.modules:
                return Point(before, "output")
        return Point(site.path, "input")

    def _beside_pooling(self, anatomy: Anatomy) -> list[Placement]:
        """CLIP's attention pooling: from the position-embedded tokens to the attention's output."""
        placed: list[Placement] = []
        for path, module in anatomy.modules.items():
            if class_name(module) != "AttentionPool2d" or not anatomy.selection(path, anatomy.address(path)):
                continue
            reader = next(n for n in ("qkv", "q") if isinstance(getattr(module, n, None), nn.Linear))
            width, out = in_channels(anatomy.module(f"{path}.{reader}")), out_channels(anatomy.module(f"{path}.proj"))
            if width is None or out is None:
                continue
            form = LinearBottleneck(width, out, bottleneck_width(width, self.reduction), zero=False)
            placed.append(Parallel(form, Point(f"{path}.{reader}", "input"), Point(f"{path}.proj", "output")))
        return placed

    # -- details ----------------------------------------------------------------------------------------

    def _form(self, anatomy: Anatomy, site: Site, cin: int, cout: int, geometry: ConvGeometry) -> ConvBottleneck:
        act = self.act
        if act == "auto":
            host = anatomy.module(site.block or site.path)
            act = activation_like(host, default=activation_like(anatomy.model))
        start: Init = _official_init(anatomy) if self.init == "official" or self._official else "zero"
        return ConvBottleneck(cin, cout, bottleneck_width(cin, self.reduction), geometry, act=act, init=start)

    def _block_geometry(self, anatomy: Anatomy, block: Site, *, strided: bool) -> ConvGeometry:
        """How a branch around the whole block slides: like the block's own spatial convolution."""
        before, after = anatomy.shape(Point(block.path, "input")), anatomy.shape(Point(block.path, "output"))
        dims = anatomy.conv_dims()
        maps = len(before) == dims + 2
        first = anatomy.layout(Point(block.path, "input")).name == "NC..."
        sizes = (before[2:], after[2:]) if first else (before[1:-1], after[1:-1])
        stride = round(sizes[0][0] / sizes[1][0]) if maps and strided else 1
        convs = [ConvGeometry.of(anatomy.module(s.path)) for s in anatomy.inside(block.path, "spatial_conv", "conv")]
        convs = [g for g in convs if not g.transposed]
        largest = max((max(g.kernel) for g in convs), default=3)
        kernel = self.kernel if isinstance(self.kernel, int) else largest
        if (self.kernel == "official" or (self.kernel == "auto" and self._official)) and block.kind in INVERTED:
            point_wise = (
                "InvertedResidual",
                "DepthwiseSeparableConv",
                "CondConvResidual",
                "UniversalInvertedResidual",
            )
            kernel = 1 if block.kind in point_wise else kernel
        host = next((g for g in convs if max(g.kernel) == largest and max(g.stride) == stride), None)
        if host is None or self._official or not strided:
            return ConvGeometry.keeping_size(dims, kernel, stride)
        return host if max(host.kernel) == kernel else host.with_kernel(kernel)

    def _post_act(self, anatomy: Anatomy, site: Site) -> Point:
        """Behind the norm and activation that follow the convolution, before the next one."""
        assert anatomy.trace is not None and site.block is not None
        calls = anatomy.trace.calls
        inside = sorted((p for p in calls if p.startswith(site.block + ".")), key=lambda p: calls[p].order)
        behind = inside[inside.index(site.path) + 1 :]
        for path in behind:
            module = anatomy.module(path)
            if is_conv(module):
                return Point(path, "input")
            alone = bool(activation_like(module, "")) and not list(module.children())
            inside_norm = is_norm(module) and not isinstance(getattr(module, "act", nn.Identity()), nn.Identity)
            if (alone or inside_norm) and calls[path].count == 1:
                return Point(path, "output")
        raise GraftError(
            f"conv-adapter: add_point='post-act' finds no activation behind {site.path!r}; use add_point='conv'"
        )

    def _norms(self, anatomy: Anatomy, adapted: set[str]) -> list[Placement]:
        named = [s for s in anatomy.find("norm") if "norm" in s.path.rpartition(".")[2]]
        layers = [s for s in named if s.kind == "layernorm"]
        final = [s for s in named if s.block is None and s not in layers and not is_batchnorm(anatomy.module(s.path))]
        chosen = [s for s in layers + final if s.block is None or s.block in adapted]
        return [
            Train(s.path, {n: p for n, p in anatomy.module(s.path)._parameters.items() if p is not None})
            for s in chosen
        ]

    def _add_point(self, anatomy: Anatomy) -> str:
        if self.add_point != "auto":
            return self.add_point
        return "post-act" if self._official and _is_resnet(anatomy) else "conv"

    def _conv_scheme(self) -> str:
        return "conv-sequential" if self.scheme.endswith("sequential") else "conv-parallel"

    @property
    def _official(self) -> bool:
        return self.preset == "official"


def _norm_before(anatomy: Anatomy, block: Site, attention: Site) -> Site | None:
    if anatomy.trace is None:
        return None
    calls = anatomy.trace.calls
    limit = calls[attention.path].order if attention.path in calls else 0
    ahead = [s for s in anatomy.inside(block.path, "norm") if s.path in calls and calls[s.path].order < limit]
    ahead = [s for s in ahead if not s.path.startswith(attention.path + ".")]
    return max(ahead, key=lambda s: calls[s.path].order, default=None)


def _is_resnet(anatomy: Anatomy) -> bool:
    return block_family(anatomy) == "resnet" and anatomy.blocks[0].name == "Bottleneck"


def _official_init(anatomy: Anatomy) -> Init:
    family = block_family(anatomy)
    starts: dict[str, Init] = {"resnet": "kaiming", "convnext": "trunc", "_efficientnet_blocks": "fan_out"}
    return starts.get(family, "default")
