"""Convpass (Jie and Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters", arXiv 2207.07039).

Beside attention and beside the MLP runs a bottleneck with a 3 x 3 convolution over the grid of patches:

    x <- x + DropPath1(branch(n)) + s DropPath2(up(dropout(a(conv(a(down(n)))))))        n = LN(x)

h = ``width``, s = ``scale``, a = QuickGELU. The bypass reads the normalised input and is added outside the branch's
LayerScale and DropPath. A class or register token is an image of one pixel, on which only the centre of the kernel
acts. Swin: on the whole map, before it is cut into windows. ConvNeXt: beside the MLP, inside the block's gamma, which
is no module. Blocks of ConvNets without such branches (an extension, not in the paper) take one bypass from the block's
input to its output, with the block's stride.

Shapes: tokens (B, P + H W, d), maps (B, H, W, d) or (B, d, H, W), to the same. Parameters per bypass:
``2 d h + k k h^2 + 2 h + d``; ViT-B/16, h = 8: 327,552, beside attention only 163,776 (the paper: 0.33 M and 0.16 M).
Not mergeable: two activations and a convolution. Start: down and, for ``conv_init="xavier"``, conv Xavier-uniform, else
conv the identity; up = 0, so the pretrained network.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ..core.anatomy import Anatomy, Site
from ..core.branches import Branch
from ..core.layers import is_conv
from ..core.method import Method, register
from ..core.placements import Layout, Parallel, Placement, Point, Sequential
from ..errors import GraftError
from .forms.branch_adapters import Sublayer, check_options
from .forms.conv_bypass import ConvBypass, ConvInit


@register("convpass")
@dataclasses.dataclass(frozen=True)
class Convpass(Method):
    """Config of Convpass.

    Attributes:
        width: h.
        scale: s; the paper chooses it per task from 0.01, 0.1, 1, 10 and 100.
        sites: Beside which branches.
        insertion: Beside the branch, or behind it on what it adds (the paper's ablation).
        kernel: Side of the kernel; 1: no view beyond the token.
        conv_init: ``"delta"``: the convolution starts as the identity; ``"xavier"``: Xavier-uniform.
        act: a.
        dropout: In front of up, in training.
        drop_path: Rate of the bypass's own stochastic depth in the last block, from 0 in the first, in training.
        inside_layer_scale: Add it to the branch's output in front of LayerScale and DropPath (not where attention
            works on windows, which has no map there).
    """

    width: int = 8
    scale: float = 1.0
    sites: tuple[Sublayer, ...] = ("attn", "mlp")
    insertion: Literal["parallel", "sequential"] = "parallel"
    kernel: int = 3
    conv_init: ConvInit = "delta"
    act: str = "quick_gelu"
    dropout: float = 0.1
    drop_path: float = 0.0
    inside_layer_scale: bool = False

    def __post_init__(self) -> None:
        check_options(self.name, width=self.width, act=self.act, sites=self.sites)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise GraftError(f"{self.name}: kernel={self.kernel} is not valid; expected an odd number")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A bypass at every branch, and one around every block that has no branches."""
        model = type(anatomy.model).__name__
        if not _reads_image(anatomy):
            raise GraftError(
                f"{self.name}: {model} reads no image (its first layer is no convolution), so its tokens stand on no "
                "grid to convolve over; use an adapter for token models, such as adaptformer"
            )
        branches = anatomy.branches("attn", "mlp")
        chosen = [b for b in branches if b.kind in self.sites]
        self._check_sizes(anatomy, chosen)
        placed = [self._at_branch(anatomy, b) for b in chosen]
        if "mlp" in self.sites:
            known = {b.block for b in branches}
            plain = [s for s in anatomy.find("block") if s.path not in known and not _concatenates(s)]
            placed += [self._around_block(anatomy, site) for site in plain]
        if not placed:
            wanted = "a residual sum" if "mlp" in self.sites else "attention"
            raise GraftError(
                f"{self.name}: no block of {model} that is selected has {wanted}, so there is no branch beside which a "
                "bypass could run; use conv-adapter"
            )
        return placed

    def _at_branch(self, anatomy: Anatomy, branch: Branch) -> Placement:
        source, target = branch.reads, branch.adds
        layout = self._layout(anatomy, source)
        d_in, size = _parts(anatomy, source, layout)
        if self.inside_layer_scale and _parts(anatomy, branch.returns, layout)[1] == size:
            target = branch.returns
        d_out = _parts(anatomy, target, layout)[0]
        if self.insertion == "sequential":
            return Sequential(self._form(anatomy, branch.block, d_out, d_out, layout, size), target, slot=branch.kind)
        return Parallel(self._form(anatomy, branch.block, d_in, d_out, layout, size), source, target, slot=branch.kind)

    def _check_sizes(self, anatomy: Anatomy, branches: list[Branch]) -> None:
        """A bypass keeps the size of the map; attention that pools, or that returns a class token alone, does not."""
        sizes = {}
        for b in branches:
            layout = self._layout(anatomy, b.reads)
            sizes[b] = _parts(anatomy, b.reads, layout)[1], _parts(anatomy, b.adds, layout)[1]
        other = [b for b, (size, added) in sizes.items() if size != added]
        if other:
            size, added = sizes[other[0]]
            raise GraftError(
                f"{self.name}: {other[0].reads} is of size {size} and no module returns what this branch adds to the "
                f"stream in that size ({other[0].adds}: {added}), so a bypass has nowhere to be added; leave such "
                f"blocks out with exclude={list(dict.fromkeys(b.block for b in other))}"
            )

    def _around_block(self, anatomy: Anatomy, site: Site) -> Placement:
        source, target = Point(site.path, "input"), Point(site.path, "output")
        layout, out_layout = self._layout(anatomy, source), self._layout(anatomy, target)
        (d_in, size), (d_out, out_size) = _parts(anatomy, source, layout), _parts(anatomy, target, out_layout)
        stride = max(1, round(size[0] / out_size[0]))
        if layout.name != out_layout.name or out_size != tuple(math.ceil(n / stride) for n in size):
            raise GraftError(
                f"{self.name}: block {site.path!r} makes {out_size} of {size}, which is no whole stride; leave it out "
                f"with exclude={site.path!r}"
            )
        if self.insertion == "sequential":
            form = self._form(anatomy, site.path, d_out, d_out, out_layout, out_size)
            return Sequential(form, target, slot="block")
        form = self._form(anatomy, site.path, d_in, d_out, layout, size, stride)
        return Parallel(form, source, target, early=True, slot="block")

    def _form(
        self, anatomy: Anatomy, block: str, d_in: int, d_out: int, layout: Layout, size: tuple[int, ...],
        stride: int = 1,
    ) -> ConvBypass:  # fmt: skip
        paths = [b.path for b in anatomy.blocks]
        depth = paths.index(block) / max(1, len(paths) - 1)
        return ConvBypass(
            d_in, d_out, self.width, layout, dims=2 if layout.name == "NLC" else len(size), kernel=self.kernel,
            stride=stride, act=self.act, dropout=self.dropout, drop_path=self.drop_path * depth, scale=self.scale,
            conv_init=self.conv_init,
        )  # fmt: skip

    def _layout(self, anatomy: Anatomy, point: Point) -> Layout:
        try:
            return anatomy.layout(point)
        except GraftError as error:
            raise GraftError(f"{self.name}: {error}") from None


@register("convpass-attn")
@dataclasses.dataclass(frozen=True)
class ConvpassAttn(Convpass):
    """Config of Convpass beside attention alone, with the start that the published code gives it.

    Attributes:
        sites: Beside which branches.
        conv_init: ``"xavier"``: the convolution starts Xavier-uniform; ``"delta"``: as the identity.
    """

    sites: tuple[Sublayer, ...] = ("attn",)
    conv_init: ConvInit = "xavier"


def _reads_image(anatomy: Anatomy) -> bool:
    maps = anatomy.trace is not None and anatomy.trace.input is not None and len(anatomy.trace.input) > 3
    return maps or (anatomy.stem is not None and is_conv(anatomy.module(anatomy.stem)))


def _parts(anatomy: Anatomy, point: Point, layout: Layout) -> tuple[int, tuple[int, ...]]:
    """(channels, the sizes between batch and channels) of the tensor at a point."""
    _, *rest = anatomy.shape(point)
    return (rest[0], tuple(rest[1:])) if layout.name == "NC..." else (rest[-1], tuple(rest[:-1]))


def _concatenates(site: Site) -> bool:
    """Whether the block's output is joined to its input instead of added (DenseNet)."""
    return site.kind.lstrip("_").startswith("Dense")
