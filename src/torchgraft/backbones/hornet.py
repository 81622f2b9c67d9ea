"""HorNet: a ConvNeXt-shaped network whose spatial mixer, gnConv, lets positions interact n times per block.

"HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", arXiv:2207.14284 (NeurIPS 2022).
One wide depthwise operator makes n gates of growing width d_k = C / 2^(n-1-k), and a recursion of pointwise
convolutions and gates does the rest, so that order n costs one depthwise operator:

    p, q = split(proj_in(x))                    C -> 2C;  p: (B, d_0, H, W), q: (B, 2C - d_0, H, W)
    g_0 ... g_(n-1) = split(s * DW(q))          g_k: (B, d_k, H, W)
    z = p * g_0;   z = pws_(k-1)(z) * g_k       k = 1 ... n-1, pws: d_(k-1) -> d_k
    gnConv(x) = proj_out(z)                     C -> C

    x = x + gamma1 * gnConv(norm1(x))
    x = x + gamma2 * W2 gelu(W1 norm2(x))       W1: C -> 4C, W2: 4C -> C

DW is a 7x7 convolution ("7x7") or, in the last two stages, half a 3x3 convolution and half a learned filter in the
Fourier domain ("gf", :mod:`.hornet_filter`). Published models have s = 1/3 and orders 2, 3, 4, 5.

Parameters (ImageNet-1K head): tiny 22,409,512 (7x7) and 22,991,848 (gf), small 49,528,264 and 50,401,768, base
87,256,680 and 88,421,352, large 194,542,504 and 196,289,512. Published: 22, 23, 50, 50, 87 and 88 million; large 209
and 211 million with its ImageNet-22K head.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply
from torch import Tensor, nn

from ..errors import GraftError
from .hornet_filter import GlobalLocalFilter, resized_filter
from .published import Published
from .pyramid import Pyramid, PyramidStage
from .timm_api import register_backbone, untrained_cfg, unwrapped

__all__ = ["PUBLISHED", "GnConv", "HorNet", "checkpoint_filter_fn", "classes_of", "official_name", "select_classes"]


class GnConv(nn.Module):
    """Recursive gated convolution of order n, (B, C, H, W) -> (B, C, H, W); for any network.

    Args:
        dim: C, a multiple of 2^(order - 1).
        order: n, at least 1.
        scale: s, the factor of the gates.
        filter_size: None for a depthwise 7x7 convolution; (h, w), the stored size of the filter, for a
            :class:`.hornet_filter.GlobalLocalFilter`.
        norm_eps: Epsilon of the filter's norms.
        dft_matmul: As for the filter.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: The order is less than 1 or the width is no such multiple.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        scale: float = 1.0,
        filter_size: tuple[int, int] | None = None,
        norm_eps: float = 1e-6,
        dft_matmul: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if order < 1:
            raise GraftError(f"gnConv of order {order}: expected an order of at least 1")
        if dim % 2 ** (order - 1):
            raise GraftError(
                f"gnConv of order {order} halves its channels {order - 1} times, which {dim} channels do not allow; "
                f"use a multiple of {2 ** (order - 1)}"
            )
        dd = {"device": device, "dtype": dtype}
        self.scale = scale
        self.widths = [dim // 2 ** (order - 1 - k) for k in range(order)]
        gates = sum(self.widths)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1, **dd)
        if filter_size is None:
            self.dwconv: nn.Module = nn.Conv2d(gates, gates, 7, padding=3, groups=gates, **dd)
        else:
            self.dwconv = GlobalLocalFilter(gates, filter_size, norm_eps, dft_matmul, **dd)
        self.pws = nn.ModuleList([nn.Conv2d(dim // 2 ** (k + 1), dim // 2**k, 1, **dd) for k in range(order - 1)][::-1])
        self.proj_out = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map with itself."""
        first, rest = self.proj_in(x).split([self.widths[0], sum(self.widths)], dim=1)
        gates = (self.dwconv(rest) * self.scale).split(self.widths, dim=1)
        x = first * gates[0]
        for k, widen in enumerate(self.pws):
            x = widen(x) * gates[k + 1]
        return self.proj_out(x)


class HorNetBlock(nn.Module):
    """gnConv and an MLP, each behind a norm and on a residual branch; (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: C.
        mixer: The gnConv of C channels.
        mlp_ratio: Width of the MLP over C.
        ls_init_value: Start of both layer scales; None or not above 0: no layer scale.
        drop_path: Rate at which a branch is left out in training.
        norm_eps: Epsilon of the norms.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        mixer: GnConv,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = 1e-6,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        start = ls_init_value or 0.0
        self.norm1 = LayerNorm2d(dim, eps=norm_eps, **dd)
        self.gnconv = mixer
        self.gamma1 = nn.Parameter(torch.full((dim,), start, **dd)) if start > 0 else None
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.gamma2 = nn.Parameter(torch.full((dim,), start, **dd)) if start > 0 else None
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Both branches."""
        mixed = self.gnconv(self.norm1(x))
        if self.gamma1 is not None:
            mixed = mixed * self.gamma1.reshape(1, -1, 1, 1)
        x = x + self.drop_path1(mixed)
        widened = self.mlp(self.norm2(x.permute(0, 2, 3, 1)))
        if self.gamma2 is not None:
            widened = widened * self.gamma2
        return x + self.drop_path2(widened.permute(0, 3, 1, 2))


class HorNet(Pyramid):
    """HorNet with timm's interface; maps of strides 4, 8, 16 and 32, rounded down.

    Args:
        in_chans: Channels of the images.
        num_classes: Outputs of the classifier; 0: none.
        global_pool: Pooling in front of the classifier; empty: none.
        output_stride: 32.
        depths: Blocks per stage.
        base_dim: Channels of the first stage; every further one has twice as many.
        orders: Order n of gnConv per stage.
        gf_sizes: Per stage None for 7x7 convolutions or the stored size (h, w) of its global filters.
        gn_scale: Factor s of the gates, one number or one per stage.
        mlp_ratio: Width of the MLPs over that of the stage.
        ls_init_value: Start of the layer scales; None or not above 0: no layer scale.
        norm_eps: Epsilon of every norm.
        head_init_scale: Factor of the classifier's initial weights.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth at the last block, rising from 0.
        dft_matmul: As for :class:`.hornet_filter.GlobalLocalFilter`.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        depths: Sequence[int] = (2, 3, 18, 2),
        base_dim: int = 64,
        orders: Sequence[int] = (2, 3, 4, 5),
        gf_sizes: Sequence[tuple[int, int] | None] = (None, None, None, None),
        gn_scale: float | Sequence[float] = 1 / 3,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = 1e-6,
        norm_eps: float = 1e-6,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dft_matmul: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert output_stride == 32, "HorNet has no dilated form: output_stride must be 32"
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        norm = partial(LayerNorm2d, eps=norm_eps)
        dims = [base_dim * 2**i for i in range(len(depths))]
        scales: list[float] = list(gn_scale) if isinstance(gn_scale, Sequence) else [gn_scale] * len(depths)
        lengths = [len(depths), len(orders), len(gf_sizes), len(scales)]
        if len(set(lengths)) > 1:
            raise GraftError(f"depths, orders, gf_sizes and gn_scale name {lengths} stages; expected the same number")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4, **dd), norm(dims[0], **dd))
        stages = []
        for i, (dim, order, size, scale) in enumerate(zip(dims, orders, gf_sizes, scales, strict=True)):
            halve = [norm(dims[i - 1], **dd), nn.Conv2d(dims[i - 1], dim, 2, stride=2, **dd)] if i else []
            blocks = [
                HorNetBlock(
                    dim,
                    GnConv(dim, order, scale, size, norm_eps, dft_matmul, **dd),
                    mlp_ratio,
                    ls_init_value,
                    rate,
                    norm_eps,
                    **dd,
                )
                for rate in rates[i]
            ]
            stages.append(PyramidStage(nn.Sequential(*halve) if halve else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm, **dd
        )
        self.head_hidden_size = self.head.num_features
        named_apply(partial(_init_weights, head_init_scale=head_init_scale), self)


def _init_weights(module: nn.Module, name: str = "", head_init_scale: float = 1.0) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Linear) and name == "head.fc":
        module.weight.data.mul_(head_init_scale)


_RENAMED = (
    (re.compile(r"^downsample_layers\.0\."), "stem."),
    (re.compile(r"^downsample_layers\.(\d+)\."), r"stages.\1.downsample."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\."), r"stages.\1.blocks.\2."),
    (re.compile(r"\.pwconv([12])\."), r".mlp.fc\1."),
    (re.compile(r"^norm\."), "head.norm."),
    (re.compile(r"^head\.(weight|bias)$"), r"head.fc.\1"),
)
_OUTPUT_NORM = re.compile(r"^norm\d\.")
"""The norms behind the maps of the published detectors and segmentors, which are no part of the backbone."""
_CLASSIFIERS = ("head.weight", "head.fc.weight")


def official_name(key: str) -> str | None:
    """Our name for a key of the published code; the output norms ``norm0`` to ``norm3`` keep theirs."""
    for pattern, ours in _RENAMED:
        key = pattern.sub(ours, key)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint, or one of ours, under our names.

    Global filters are resized to those of ``model``. The output norms of a dense model's file are left out where
    ``model`` has no place for them.
    """
    state, target = unwrapped(state_dict), model.state_dict()
    ours = "stem.0.weight" in state
    converted = {}
    for key, value in state.items():
        name = key if ours else official_name(key)
        if name is None or (_OUTPUT_NORM.match(name) and name not in target):
            continue
        if name.endswith(".complex_weight") and name in target:
            value = resized_filter(value, *target[name].shape[1:3])
        converted[name] = value
    return converted


def classes_of(checkpoint: Mapping[str, Any]) -> int | None:
    """Number of classes of a checkpoint, None without a classifier.

    The published ImageNet-22K files have about 10,450 classes, not 21,841: the number comes from the file.
    """
    state = unwrapped(dict(checkpoint))
    return next((state[key].shape[0] for key in _CLASSIFIERS if key in state), None)


def select_classes(checkpoint: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Tensor]:
    """The state dict of a checkpoint whose classifier keeps some classes only.

    Args:
        checkpoint: Published or ours; it is not changed.
        rows: Which classes, in their new order: for ImageNet-1K out of a 22K file the 1000 numbers of the published
            ``in1k_to_21k_map.pth``.

    Raises:
        GraftError: There is no classifier, or it has no such class.
    """
    count, state = classes_of(checkpoint), unwrapped(dict(checkpoint))
    if count is None:
        raise GraftError("the checkpoint has no classifier to take classes from")
    index = torch.as_tensor(rows, dtype=torch.long)
    missing = index[(index < 0) | (index >= count)].tolist()
    if missing:
        raise GraftError(f"the checkpoint has {count} classes, numbered from 0; class {missing[0]} is none of them")
    return {k: v[index] if re.fullmatch(r"head\.(fc\.)?(weight|bias)", k) else v for k, v in state.items()}


_cfg = partial(
    untrained_cfg,
    license="mit",
    paper_ids="arXiv:2207.14284",
    paper_name="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
    origin_url="https://github.com/raoyongming/HorNet",
)


# The published preprocessing takes the whole picture, squeezed to a square, from 384 pixels on.
_cfg_384 = partial(_cfg, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash")
_cfg_test = partial(_cfg, input_size=(3, 64, 64), pool_size=(2, 2), num_classes=10)

default_cfgs = generate_default_cfgs(
    {
        "hornet_tiny_7x7.in1k": _cfg(),
        "hornet_tiny_gf.in1k": _cfg(),
        "hornet_small_7x7.in1k": _cfg(),
        "hornet_small_gf.in1k": _cfg(),
        "hornet_base_7x7.in1k": _cfg(),
        "hornet_base_gf.in1k": _cfg(),
        "hornet_base_gf_img384.untrained": _cfg_384(),
        "hornet_large_7x7.in22k": _cfg(),
        "hornet_large_gf.in22k": _cfg(),
        "hornet_large_gf_img384.in22k": _cfg_384(),
        "test_hornet.untrained": _cfg_test(),
        "test_hornet_gf.untrained": _cfg_test(),
    }
)

_TINY, _SMALL, _BASE, _LARGE = ((b, 2 * b, 4 * b, 8 * b) for b in (64, 96, 128, 192))

PUBLISHED: dict[str, Published] = {
    "hornet_tiny_7x7": Published(22_409_512, 3.968, _TINY, top1=82.8),
    "hornet_tiny_gf": Published(22_991_848, 3.889, _TINY, top1=83.0),
    "hornet_small_7x7": Published(49_528_264, 8.814, _SMALL, top1=83.8),
    "hornet_small_gf": Published(50_401_768, 8.694, _SMALL, top1=84.0),
    "hornet_base_7x7": Published(87_256_680, 15.567, _BASE, top1=84.2),
    "hornet_base_gf": Published(88_421_352, 15.408, _BASE, top1=84.3),
    "hornet_base_gf_img384": Published(92_099_560, 45.278, _BASE, side=384),
    "hornet_large_7x7": Published(194_542_504, 34.796, _LARGE),
    "hornet_large_gf": Published(196_289_512, 34.557, _LARGE),
    "hornet_large_gf_img384": Published(201_806_824, 101.553, _LARGE, side=384),
}

_GF_224 = (None, None, (14, 8), (7, 4))
_GF_384 = (None, None, (24, 13), (12, 7))


def _create_hornet(variant: str, pretrained: bool, **kwargs: Any) -> HorNet:
    return build_model_with_cfg(
        HorNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_backbone
def hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T with 7x7 convolutions."""
    return _create_hornet("hornet_tiny_7x7", pretrained, **{"base_dim": 64, **kwargs})


@register_backbone
def hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T with global filters."""
    return _create_hornet("hornet_tiny_gf", pretrained, **{"base_dim": 64, "gf_sizes": _GF_224, **kwargs})


@register_backbone
def hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S with 7x7 convolutions."""
    return _create_hornet("hornet_small_7x7", pretrained, **{"base_dim": 96, **kwargs})


@register_backbone
def hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S with global filters."""
    return _create_hornet("hornet_small_gf", pretrained, **{"base_dim": 96, "gf_sizes": _GF_224, **kwargs})


@register_backbone
def hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with 7x7 convolutions."""
    return _create_hornet("hornet_base_7x7", pretrained, **{"base_dim": 128, **kwargs})


@register_backbone
def hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with global filters."""
    return _create_hornet("hornet_base_gf", pretrained, **{"base_dim": 128, "gf_sizes": _GF_224, **kwargs})


@register_backbone
def hornet_base_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with global filters stored for images of 384 pixels."""
    return _create_hornet("hornet_base_gf_img384", pretrained, **{"base_dim": 128, "gf_sizes": _GF_384, **kwargs})


@register_backbone
def hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L with 7x7 convolutions."""
    return _create_hornet("hornet_large_7x7", pretrained, **{"base_dim": 192, **kwargs})


@register_backbone
def hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L with global filters."""
    return _create_hornet("hornet_large_gf", pretrained, **{"base_dim": 192, "gf_sizes": _GF_224, **kwargs})


@register_backbone
def hornet_large_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L with global filters stored for images of 384 pixels."""
    return _create_hornet("hornet_large_gf_img384", pretrained, **{"base_dim": 192, "gf_sizes": _GF_384, **kwargs})


@register_backbone
def test_hornet(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """A small network for tests."""
    return _create_hornet("test_hornet", pretrained, **{**_TEST, **kwargs})


@register_backbone
def test_hornet_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """A small network for tests, with global filters."""
    return _create_hornet("test_hornet_gf", pretrained, **{**_TEST, "gf_sizes": (None, None, (4, 3), (2, 2)), **kwargs})


_TEST: dict[str, Any] = {"base_dim": 8, "depths": (1, 1, 2, 1), "mlp_ratio": 2}
