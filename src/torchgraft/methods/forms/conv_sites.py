"""Where a Conv-Adapter bottleneck goes: beside a convolution, around a block, beside attention."""

from __future__ import annotations

import dataclasses

from ...core.anatomy import Anatomy, Site
from ...core.layers import ConvGeometry, activation_like, is_conv, is_norm
from ...core.placements import Parallel, Placement, Point, Sequential
from ...errors import GraftError
from .conv_bottleneck import ConvBottleneck, Init, bottleneck_width


@dataclasses.dataclass(frozen=True)
class ConvSites:
    """Builds the placements of one adapter.

    Attributes:
        anatomy: The model's.
        reduction: gamma, by which the bottleneck is narrower than what it reads.
        act: Activation; ``auto``: that of the block.
        init: Start of the bottleneck.
        kernel: Kernel size in place of that of the adapted convolution; None: the same.
        symmetric: Pad symmetrically around a block even where the block's own convolution does not.
    """

    anatomy: Anatomy
    reduction: float
    act: str
    init: Init
    kernel: int | None = None
    symmetric: bool = False

    def beside_conv(self, site: Site, source: Point, output: Point) -> Placement:
        """``C(u) + A(u)``: parallel to a convolution."""
        geometry = self._geometry(site)
        assert site.in_channels is not None and site.out_channels is not None
        return Parallel(self._form(site, site.in_channels, site.out_channels, geometry), source, output)

    def behind_conv(self, site: Site, output: Point) -> Placement:
        """``v + A(v)``, v = C(u): behind a convolution."""
        geometry = self._geometry(site)
        assert site.out_channels is not None
        kernel = geometry.kernel if len(set(geometry.kernel)) > 1 else geometry.kernel[0]
        keeping = ConvGeometry.keeping_size(geometry.dims, kernel)
        return Sequential(self._form(site, site.out_channels, site.out_channels, keeping), output)

    def around_block(self, block: Site, *, sequential: bool = False) -> Placement:
        """``y + A(x)`` with x and y the input and output of the block, or ``y + A(y)``."""
        before, after = Point(block.path, "input"), Point(block.path, "output")
        layout, out_layout = self.anatomy.layout(before), self.anatomy.layout(after)
        geometry = self._block_geometry(block, strided=not sequential)
        width, out_width = self.anatomy.channels(before, layout), self.anatomy.channels(after, out_layout)
        if sequential:
            return Sequential(self._form(block, out_width, out_width, geometry), after, layout=out_layout)
        form = self._form(block, width, out_width, geometry)
        return Parallel(form, before, after, layout=layout, out_layout=out_layout, early=True)

    def beside_attention(self, block: Site) -> Placement | None:
        """From the norm before the attention to the residual sum behind it, on the token grid; None: no such place."""
        branch = next((b for b in self.anatomy.branches("attn") if b.block == block.path), None)
        if branch is None or not branch.pre_norm:
            return None
        layout = self.anatomy.layout(branch.reads)
        if self.anatomy.shape(branch.adds) != self.anatomy.shape(branch.reads):
            return None
        width = self.anatomy.channels(branch.reads, layout)
        kernel = self.kernel or (7 if "Swin" in block.kind else 3)
        form = self._form(block, width, width, ConvGeometry.keeping_size(2, kernel))
        return Parallel(form, branch.reads, branch.adds, layout=layout)

    def behind_activation(self, site: Site) -> Point:
        """Behind the norm and activation that follow the convolution, before the next one.

        Raises:
            GraftError: There is no activation.
        """
        trace = self.anatomy.trace
        assert trace is not None and site.block is not None
        inside = sorted((p for p in trace.calls if p.startswith(site.block + ".")), key=lambda p: trace.calls[p].order)
        for path in inside[inside.index(site.path) + 1 :]:
            module = self.anatomy.module(path)
            if is_conv(module):
                return Point(path, "input")
            alone = bool(activation_like(module, "")) and not list(module.children())
            inside_norm = is_norm(module) and bool(activation_like(module, ""))
            if (alone or inside_norm) and trace.calls[path].count == 1:
                return Point(path, "output")
        raise GraftError(
            f"conv-adapter: add_point='post-act' finds no activation behind {site.path!r}; use add_point='conv'"
        )

    def _geometry(self, site: Site) -> ConvGeometry:
        geometry = ConvGeometry.of(self.anatomy.module(site.path))
        return geometry if self.kernel is None else geometry.with_kernel(self.kernel)

    def _block_geometry(self, block: Site, *, strided: bool) -> ConvGeometry:
        """How a branch around the whole block slides: like the block's own spatial convolution."""
        dims = self.anatomy.conv_dims()
        stride = self._stride(block, dims) if strided else 1
        inside = self.anatomy.inside(block.path, "spatial_conv", "conv")
        convs = [g for g in (ConvGeometry.of(self.anatomy.module(s.path)) for s in inside) if not g.transposed]
        largest = max((max(g.kernel) for g in convs), default=3)
        kernel = self.kernel or largest
        host = next((g for g in convs if max(g.kernel) == largest and max(g.stride) == stride), None)
        if host is None or self.symmetric or not strided:
            return ConvGeometry.keeping_size(dims, kernel, stride)
        return host if max(host.kernel) == kernel else host.with_kernel(kernel)

    def _stride(self, block: Site, dims: int) -> int:
        """By how much the block makes its map smaller."""
        before, after = Point(block.path, "input"), Point(block.path, "output")
        shapes = self.anatomy.shape(before), self.anatomy.shape(after)
        if len(shapes[0]) != dims + 2:
            return 1
        first = self.anatomy.layout(before).name == "NC..."
        sizes = [shape[2:] if first else shape[1:-1] for shape in shapes]
        return round(sizes[0][0] / sizes[1][0])

    def _form(self, site: Site, cin: int, cout: int, geometry: ConvGeometry) -> ConvBottleneck:
        act = self.act
        if act == "auto":
            host = self.anatomy.module(site.block or site.path)
            act = activation_like(host, default=activation_like(self.anatomy.model))
        return ConvBottleneck(cin, cout, bottleneck_width(cin, self.reduction), geometry, act=act, init=self.init)
