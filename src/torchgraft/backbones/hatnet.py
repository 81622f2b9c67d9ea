"""HAT-Net: pyramid of hierarchical attention and depthwise-convolution MLPs on (B, C, H, W) maps.

"Vision Transformers with Hierarchical Attention", arXiv:2106.03180 (Machine Intelligence Research 2024), first titled
"Transformer in Convolutional Neural Networks". Each of the four stages is a step down and blocks of

    x = x + attn(x)         inside G x G windows, then to a map pooled over r x r: .hatnet_attention
    x = x + conv(x)         conv(x) = norm(W2 silu(depthwise_kxk(silu(W1 norm(x)))))      W1: C -> e C, W2: e C -> C

with GroupNorms of one group. The cost grows with H W (G^2 + H W / r^2), not with (H W)^2, and nothing depends on the
size of the image.

Parameters (ImageNet-1K head, without the norms of the published code that no output depends on): tiny 12,650,152,
small 25,738,568, medium 42,925,960, large 63,108,936. Published: 12.7, 25.7, 42.9 and 63.1 million.
"""

# Annotations are objects here, not strings: FX hands that of an input on to TorchScript, which knows no string.
import re
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from ..errors import GraftError
from .hatnet_attention import Attention, HierarchicalAttention, map_norm
from .published import Published
from .pyramid import Pyramid, PyramidStage
from .timm_api import register_backbone, untrained_cfg, unwrapped

__all__ = ["PUBLISHED", "HatNet", "checkpoint_filter_fn", "official_name"]


class DepthwiseMlp(nn.Module):
    """MLP of 1 x 1 convolutions with a depthwise convolution at the wide end.

    Shapes: (B, C, H, W) -> (B, C, H, W). Parameters: ``2 e C C + k k e C + 4 C``.

    Args:
        dim: C.
        expansion: e.
        kernel_size: k of the depthwise convolution, odd.
        drop: Rate at which channels are dropped, behind the depthwise convolution and at the end.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, dim: int, expansion: int, kernel_size: int, drop: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        wide = expansion * dim
        self.conv1 = nn.Sequential(map_norm(dim, **dd), nn.Conv2d(dim, wide, 1, bias=False, **dd), nn.SiLU())
        depthwise = nn.Conv2d(wide, wide, kernel_size, padding=kernel_size // 2, groups=wide, bias=False, **dd)
        self.conv2 = nn.Sequential(depthwise, nn.SiLU(), nn.Dropout2d(drop))
        self.conv3 = nn.Sequential(nn.Conv2d(wide, dim, 1, bias=False, **dd), map_norm(dim, **dd), nn.Dropout2d(drop))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the residual stream."""
        return self.conv3(self.conv2(self.conv1(x)))


class Block(nn.Module):
    """Attention and MLP, each with a residual sum.

    Shapes: (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: C.
        head_dim: Channels of a head.
        grid: Side G of the windows; 1: attention over the whole map.
        ratio: Side r of the pooled squares; of no meaning with G = 1.
        expansion: Width of the MLP's middle over C.
        kernel_size: Kernel of its depthwise convolution.
        proj_drop: Rate at which channels are dropped in both branches.
        drop_path: Rate of stochastic depth.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        grid: int,
        ratio: int,
        expansion: int,
        kernel_size: int,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.attn = (
            HierarchicalAttention(dim, head_dim, grid, ratio, proj_drop, **dd)
            if grid > 1
            else Attention(dim, head_dim, proj_drop, **dd)
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.conv = DepthwiseMlp(dim, expansion, kernel_size, proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream behind the block."""
        x = x + self.drop_path1(self.attn(x))
        return x + self.drop_path2(self.conv(x))


class Downsample(nn.Module):
    """Convolution with stride 2 and a norm: (B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = map_norm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Half the resolution, other channels."""
        return self.norm(self.conv(x))


class HatNet(Pyramid):
    """HAT-Net.

    Shapes: (B, in_chans, H, W) -> (B, num_classes), for any H and W. The maps of the stages have strides 4, 8, 16
    and 32, their sizes are rounded up.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0: no classifier.
        global_pool: Pooling ahead of it; empty: none.
        output_stride: 32; the network has no dilated form.
        dims: Channels of the stages.
        head_dim: Channels of an attention head, in all of them.
        expansions: Width of the MLP's middle over the channels, per stage.
        grid_sizes: Side of the attention windows; 1: attention over the whole map.
        ds_ratios: Side of the squares that the keys of the second attention average.
        depths: Blocks per stage.
        kernel_sizes: Kernels of the depthwise convolutions, odd.
        stem_width: Channels between the stem's two convolutions.
        drop_rate: Dropout ahead of the classifier.
        proj_drop_rate: Rate at which channels are dropped in attention and MLP.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: Stages are named in unequal number, a stage's channels are no multiple of ``head_dim``, or a
            kernel is even.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        head_dim: int = 64,
        expansions: tuple[int, ...] = (8, 8, 4, 4),
        grid_sizes: tuple[int, ...] = (8, 7, 7, 1),
        ds_ratios: tuple[int, ...] = (8, 4, 2, 1),
        depths: tuple[int, ...] = (2, 3, 8, 3),
        kernel_sizes: tuple[int, ...] = (3, 3, 3, 3),
        stem_width: int = 16,
        drop_rate: float = 0.2,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert output_stride == 32, "HAT-Net has no dilated form: output_stride must be 32."
        dd = {"device": device, "dtype": dtype}
        per_stage = (expansions, grid_sizes, ds_ratios, depths, kernel_sizes)
        _check(dims, head_dim, per_stage, kernel_sizes)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate

        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_width, 3, stride=2, padding=1, **dd),
            map_norm(stem_width, **dd),
            nn.SiLU(),
            nn.Conv2d(stem_width, dims[0], 3, stride=2, padding=1, **dd),
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        for i, (dim, expansion, grid, ratio, depth, kernel) in enumerate(zip(dims, *per_stage, strict=True)):
            blocks: list[nn.Module] = [
                Block(dim, head_dim, grid, ratio, expansion, kernel, proj_drop_rate, rates[i][j], **dd)
                for j in range(depth)
            ]
            stages.append(PyramidStage(Downsample(dims[i - 1], dim, **dd) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.apply(_init_weights)


def _check(
    dims: tuple[int, ...], head_dim: int, per_stage: tuple[tuple[int, ...], ...], kernel_sizes: tuple[int, ...]
) -> None:
    if any(len(values) != len(dims) for values in per_stage):
        raise GraftError(
            f"hatnet: dims={tuple(dims)} names {len(dims)} stages; expansions, grid_sizes, ds_ratios, depths and "
            f"kernel_sizes need as many values, and have {', '.join(str(len(values)) for values in per_stage)}"
        )
    if odd := [dim for dim in dims if dim % head_dim]:
        raise GraftError(f"hatnet: head_dim={head_dim} does not divide the {odd[0]} channels of a stage")
    if even := [kernel for kernel in kernel_sizes if kernel % 2 == 0]:
        raise GraftError(f"hatnet: kernel_sizes holds {even[0]}, which is even; the depthwise kernels must be odd")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def official_name(key: str) -> str | None:
    """Our key for one of the published code; None for a norm that it owns and never uses."""
    if re.search(r"\.attn\.proj_norm\.", key):
        return None
    key = re.sub(r"^patch_embed\.", "stem.", key)
    key = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    key = re.sub(r"^ds(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.downsample.", key)
    return re.sub(r"^classifier\.1\.", "head.fc.", key)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint or one of ours as a state dict of ``model``."""
    state = unwrapped(state_dict)
    if "patch_embed.0.weight" not in state:
        return state
    named = {official_name(key): value for key, value in state.items()}
    return {key: value for key, value in named.items() if key is not None}


_cfg = partial(
    untrained_cfg,
    paper_ids="arXiv:2106.03180",
    paper_name="Vision Transformers with Hierarchical Attention",
    origin_url="https://github.com/yun-liu/HAT-Net",
)


default_cfgs = generate_default_cfgs(
    {
        "hatnet_tiny.in1k": _cfg(),
        "hatnet_small.in1k": _cfg(),
        "hatnet_medium.in1k": _cfg(),
        "hatnet_large.in1k": _cfg(),
        "test_hatnet.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)

PUBLISHED: dict[str, Published] = {
    "hatnet_tiny": Published(12_650_152, 1.970, (48, 96, 240, 384), top1=79.8),
    "hatnet_small": Published(25_738_568, 4.293, (64, 128, 320, 512), top1=82.6),
    "hatnet_medium": Published(42_925_960, 8.295, (64, 128, 320, 512), top1=84.0),
    "hatnet_large": Published(63_108_936, 11.440, (64, 128, 320, 640), top1=84.2),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> HatNet:
    return build_model_with_cfg(
        HatNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_backbone
def hatnet_tiny(pretrained: bool = False, **kwargs: Any) -> HatNet:
    """HAT-Net-Tiny: 12.7 million parameters, 2.0 GMACs."""
    size = {"dims": (48, 96, 240, 384), "head_dim": 48, "depths": (2, 2, 6, 3)}
    return _create("hatnet_tiny", pretrained, **{**size, **kwargs})


@register_backbone
def hatnet_small(pretrained: bool = False, **kwargs: Any) -> HatNet:
    """HAT-Net-Small: 25.7 million parameters, 4.3 GMACs."""
    size = {"dims": (64, 128, 320, 512), "depths": (2, 3, 8, 3)}
    return _create("hatnet_small", pretrained, **{**size, **kwargs})


@register_backbone
def hatnet_medium(pretrained: bool = False, **kwargs: Any) -> HatNet:
    """HAT-Net-Medium: 42.9 million parameters, 8.3 GMACs."""
    size = {"dims": (64, 128, 320, 512), "depths": (3, 6, 18, 3), "kernel_sizes": (5, 3, 5, 3)}
    return _create("hatnet_medium", pretrained, **{**size, **kwargs})


@register_backbone
def hatnet_large(pretrained: bool = False, **kwargs: Any) -> HatNet:
    """HAT-Net-Large: 63.1 million parameters, 11.5 GMACs."""
    size = {"dims": (64, 128, 320, 640), "depths": (3, 8, 27, 3)}
    return _create("hatnet_large", pretrained, **{**size, **kwargs})


@register_backbone
def test_hatnet(pretrained: bool = False, **kwargs: Any) -> HatNet:
    """A very small one for tests, with windows that fit its maps and windows that do not."""
    size = {
        "dims": (8, 16, 24, 32),
        "head_dim": 8,
        "expansions": (2, 2, 2, 2),
        "grid_sizes": (4, 3, 2, 1),
        "ds_ratios": (4, 2, 2, 1),
        "depths": (1, 1, 2, 1),
        "stem_width": 8,
    }
    return _create("test_hatnet", pretrained, **{**size, **kwargs})
