"""A stage of InternImage: blocks of DCNv3 and an MLP, in any of the five published orders of norms and layer scale.

The equations are in :mod:`torchgraft.backbones.internimage`. Source: "InternImage: Exploring Large-Scale Vision
Foundation Models with Deformable Convolutions", arXiv:2211.05778.
"""

# Annotations are objects here, not strings: FX hands that of an input on to TorchScript, which knows no string.
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, LayerScale, Mlp
from timm.models import checkpoint
from torch import Tensor, fx, nn

from ..errors import GraftError
from ..ops import dcnv3

__all__ = ["BetweenNorm", "DCNv3", "InternImageBlock", "InternImageStage"]

fx.wrap("dcnv3")


class DCNv3(nn.Module):
    """The token mixer: projections around the operator, and the branch that its offsets and weights come from.

    Shapes: (N, H, W, C) -> (N, H, W, C); with a stride the map is smaller. Parameters:
    ``2 (C^2 + C) + C (k^2 + 3) + 3 G P (C + 1)``, with centre scale ``+ G (C + 1)``.

    Args:
        dim: C.
        groups: G; divides C.
        kernel_size: Side of the regular grid; P is its square.
        dw_kernel_size: k, side of the depthwise convolution, odd.
        stride: Steps between outputs, in pixels.
        padding: Zeros around the map, in pixels.
        dilation: Pixels between neighbours of the regular grid.
        offset_scale: Factor of grid and offsets.
        center_feature_scale: Whether every group blends what it sampled with its own pixel.
        remove_center: Whether the point in the middle of the grid is left out, so that P is one less.
        op_backend: Which implementation of the operator runs; None: the best one for the tensors at hand.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: ``groups`` does not divide ``dim``, or ``dw_kernel_size`` is even.
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        kernel_size: int = 3,
        dw_kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        op_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise GraftError(f"internimage: groups={groups} does not divide the {dim} channels of a level")
        if dw_kernel_size % 2 == 0:
            raise GraftError(f"internimage: dw_kernel_size={dw_kernel_size} is even; the depthwise kernel must be odd")
        dd = {"device": device, "dtype": dtype}
        self.groups, self.kernel_size, self.stride, self.padding = groups, kernel_size, stride, padding
        self.dilation, self.offset_scale, self.remove_center = dilation, float(offset_scale), remove_center
        self.op_backend = op_backend
        points = groups * (kernel_size**2 - remove_center)
        self.dw_conv = nn.Sequential(
            nn.Conv2d(dim, dim, dw_kernel_size, padding=dw_kernel_size // 2, groups=dim, **dd),
            LayerNorm2d(dim, **dd),
            nn.GELU(),
        )
        self.offset = nn.Linear(dim, 2 * points, **dd)
        self.mask = nn.Linear(dim, points, **dd)
        self.center_feature_scale_proj = nn.Linear(dim, groups, **dd) if center_feature_scale else None
        self.input_proj = nn.Linear(dim, dim, **dd)
        self.output_proj = nn.Linear(dim, dim, **dd)

    def init_weights(self) -> None:
        """The published start: no offsets and equal weights, so that every point of the grid counts the same."""
        for projection in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
        for read in (self.offset, self.mask, self.center_feature_scale_proj):
            if read is not None:
                nn.init.zeros_(read.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The mixed map."""
        v = self.input_proj(x)
        z = self.dw_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = dcnv3(
            v,
            self.offset(z),
            self.mask(z),
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            softmax=True,
            backend=self.op_backend,
        )
        if self.center_feature_scale_proj is not None:
            scale = torch.sigmoid(self.center_feature_scale_proj(z)).unsqueeze(-1)
            y = y.unflatten(3, [self.groups, -1])
            y = (y + scale * (v.unflatten(3, [self.groups, -1]) - y)).flatten(3)
        return self.output_proj(y)


class InternImageBlock(nn.Module):
    """DCNv3 and MLP, each with a residual sum.

    Shapes: (N, H, W, C) -> (N, H, W, C).

    Args:
        dim: C.
        mlp_ratio: Width of the MLP's middle over C.
        proj_drop: Dropout rate in the MLP.
        drop_path: Rate of stochastic depth.
        layer_scale: Start of the layer scale; None: there is none.
        post_norm: Whether the norms stand behind the branches and not in front of them.
        res_post_norm: Whether there are norms in front of the branches and behind them; of no effect with
            ``post_norm`` or a layer scale, as published.
        device: Where the parameters are made.
        dtype: Their type.
        **dcn: Options of :class:`DCNv3`.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        res_post_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
        **dcn: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.post_norm = post_norm
        both = res_post_norm and not post_norm and layer_scale is None
        self.norm1 = LayerNorm(dim, **dd)
        self.dcn = DCNv3(dim, **dcn, **dd)
        self.res_post_norm1 = LayerNorm(dim, **dd) if both else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.res_post_norm2 = LayerNorm(dim, **dd) if both else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream behind the block."""
        # Stochastic depth and layer scale commute. A norm with stochastic depth at once behind it is known to belong
        # to the branch, so that what adapters add to the stream is added behind it.
        if self.post_norm:
            x = x + self.ls1(self.drop_path1(self.norm1(self.dcn(x))))
            return x + self.ls2(self.drop_path2(self.norm2(self.mlp(x))))
        x = x + self.ls1(self.drop_path1(self.res_post_norm1(self.dcn(self.norm1(x)))))
        return x + self.ls2(self.drop_path2(self.res_post_norm2(self.mlp(self.norm2(x)))))


class BetweenNorm(LayerNorm):
    """A norm of the residual stream behind one of a stage's blocks, (N, H, W, C); ``after`` is the block's number."""

    def __init__(self, dim: int, after: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, device=device, dtype=dtype)
        self.after = after


class InternImageStage(nn.Module):
    """Blocks of one resolution, behind the step down to it.

    Shapes: (N, C', H', W') -> (N, C, H, W), channels last in memory.

    Args:
        downsample: (N, C', H', W') -> (N, C, H, W).
        blocks: The blocks.
        between: Norms of the stream behind some of them.
        norm: Norm of the output.
    """

    def __init__(
        self, downsample: nn.Module, blocks: list[nn.Module], between: list[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.post_norms = nn.ModuleList(between)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """The stage's map."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            for norm in self.post_norms:
                if norm.after == i:
                    x = norm(x)
        return self.norm(x).permute(0, 3, 1, 2)
