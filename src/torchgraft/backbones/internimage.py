"""InternImage: a transformer-like pyramid whose token mixer is a deformable convolution, DCNv3.

"InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", arXiv:2211.05778. A pixel of
a map (H, W, C) samples its neighbourhood, per group g of D = C / G channels, at P = 9 points of a 3 x 3 grid that
offsets move, with weights that a softmax makes of P logits. Both are read from the map itself:

    z = GELU(LN(depthwise(u)))                                                                      (H, W, C)
    y_g(p) = sum_t softmax_t(W_m z)_gt  v_g(p + scale (p_t + (W_o z)_gt)),   v = W_in u             (H, W, D) each
    dcn(u) = W_out y                with centre scale: W_out (y (1 - s) + v s),  s = sigmoid(W_s z)  (H, W, G)
    x = x + dcn(LN(x));   x = x + mlp(LN(x))          in front, behind, or both; with or without layer scale

Everything between the stem and the maps is channels last. A step down to the next resolution is part of the stage that
it leads to, so that the output of a stage is the published map, of channels C, 2C, 4C, 8C.

Parameters (ImageNet-1K head): tiny 29,918,424, small 50,079,880, base 97,461,832, large 223,334,810, xlarge
334,819,780, huge 1,089,636,760, giant 3,076,373,352. Published: 30, 50, 97, 223, 335 million, 1.08 and 3 billion.
"""

# Annotations are objects here, not strings: FX hands that of an input on to TorchScript, which knows no string.
import re
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    LayerNorm,
    LayerNorm2d,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from ..errors import GraftError
from ..ops import describe
from .internimage_block import BetweenNorm, DCNv3, InternImageBlock, InternImageStage
from .internimage_head import ClipFusion, ClipHead
from .published import Published
from .pyramid import Pyramid
from .timm_api import feature_take_indices, register_backbone, untrained_cfg, unwrapped

__all__ = ["PUBLISHED", "InternImage", "checkpoint_filter_fn", "official_name", "runs_with"]


class InternImage(Pyramid):
    """InternImage.

    Shapes: (N, in_chans, H, W) -> (N, num_classes), for any H and W. The maps of the stages have strides 4, 8, 16 and
    32, their sizes are rounded up.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0: no classifier.
        global_pool: Pooling ahead of it; empty: none. ``"attn"``, with the clip projector only, is its attention.
        output_stride: 32; the network has no dilated form.
        channels: C of the first stage; each stage has twice those of the one before.
        depths: Blocks per stage.
        groups: Groups of DCNv3 per stage.
        mlp_ratio: Width of the MLP's middle over the channels.
        layer_scale: Start of the layer scale; None: there is none.
        post_norm: Whether norms stand behind the branches and not in front of them.
        res_post_norm: Whether norms stand on both sides (without ``post_norm`` and layer scale only).
        offset_scale: Factor of DCNv3's grid and offsets.
        dw_kernel_size: Kernel of DCNv3's depthwise convolution, odd.
        level2_post_norm_block_ids: Blocks of the third stage behind which the stream goes through a norm.
        center_feature_scale: Whether DCNv3 blends in its own pixel.
        remove_center: Whether DCNv3 leaves out its centre point.
        cls_scale: Width of the convolution ahead of the pooling over the last stage's channels.
        use_clip_projector: Whether the head is the one of the two largest sizes: the last two maps joined, pooled by
            attention (:mod:`.internimage_head`).
        clip_dim: Channels of the joined map.
        clip_num_heads: Heads of the attention.
        clip_out_dim: Width of what it pools to.
        drop_rate: Dropout ahead of the classifier.
        pos_drop_rate: Dropout behind the stem.
        proj_drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        op_backend: Which implementation of DCNv3 runs (:meth:`set_op_backend`).
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: ``groups`` does not name as many stages as ``depths`` or does not divide their channels, a block
            of ``level2_post_norm_block_ids`` does not exist, or the depthwise kernel is even.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        channels: int = 64,
        depths: tuple[int, ...] = (4, 4, 18, 4),
        groups: tuple[int, ...] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        res_post_norm: bool = False,
        offset_scale: float = 1.0,
        dw_kernel_size: int = 3,
        level2_post_norm_block_ids: tuple[int, ...] = (),
        center_feature_scale: bool = False,
        remove_center: bool = False,
        cls_scale: float = 1.5,
        use_clip_projector: bool = False,
        clip_dim: int = 1024,
        clip_num_heads: int = 16,
        clip_out_dim: int = 768,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        op_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert output_stride == 32, "InternImage has no dilated form: output_stride must be 32."
        assert use_clip_projector or global_pool != "attn", "Pooling by attention belongs to the clip projector."
        _check(depths, groups, level2_post_norm_block_ids)
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate

        stem: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(in_chans, channels // 2, 3, stride=2, padding=1, **dd),
            "norm1": LayerNorm2d(channels // 2, **dd),
            "act": nn.GELU(),
            "conv2": nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, **dd),
            "norm2": LayerNorm2d(channels, **dd),
            "drop": nn.Dropout(pos_drop_rate),
        }
        self.stem = nn.Sequential(OrderedDict(stem))
        dims = [channels * 2**i for i in range(len(depths))]
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        for i, dim in enumerate(dims):
            blocks: list[nn.Module] = [
                InternImageBlock(
                    dim,
                    mlp_ratio,
                    proj_drop_rate,
                    rate,
                    layer_scale,
                    post_norm,
                    res_post_norm,
                    groups=groups[i],
                    dw_kernel_size=dw_kernel_size,
                    offset_scale=offset_scale,
                    center_feature_scale=center_feature_scale,
                    remove_center=remove_center,
                    op_backend=op_backend,
                    **dd,
                )
                for rate in rates[i]
            ]
            after = sorted(level2_post_norm_block_ids) if i == 2 else []
            between: list[nn.Module] = [BetweenNorm(dim, block, **dd) for block in after]
            normed = not post_norm or center_feature_scale
            stages.append(
                InternImageStage(
                    _downsample(dims[i - 1], dim, **dd) if i else nn.Identity(),
                    blocks,
                    between,
                    LayerNorm(dim, **dd) if normed else nn.Identity(),
                )
            )
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.fusion: ClipFusion | None = None
        self.conv_head: nn.Module = nn.Identity()
        self.head: ClipHead | ClassifierHead
        if use_clip_projector:
            self.num_features = clip_dim
            self.fusion = ClipFusion(dims[-2], dims[-1], clip_dim, **dd)
            self.head = ClipHead(clip_dim, clip_out_dim, clip_num_heads, num_classes, global_pool, drop_rate, **dd)
        else:
            self.num_features, width = dims[-1], int(dims[-1] * cls_scale)
            conv_head: dict[str, nn.Module] = {
                "conv": nn.Conv2d(dims[-1], width, 1, bias=False, **dd),
                "norm": nn.BatchNorm2d(width, **dd),
                "act": nn.GELU(),
            }
            self.conv_head = nn.Sequential(OrderedDict(conv_head))
            self.head = ClassifierHead(width, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.apply(_init_weights)

    @torch.jit.ignore
    def set_op_backend(self, backend: str | None) -> None:
        """Choose the implementation of DCNv3 in every block; None: the best one for the tensors at hand.

        Args:
            backend: A name that :func:`torchgraft.ops.dcnv3` knows, such as ``"grid_sample"`` for export to ONNX.
        """
        for module in self.modules():
            if isinstance(module, DCNv3):
                module.op_backend = backend

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input to the output, per stage or per block."""
        by_block = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:post_norms|norm)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Make a new classifier; ``global_pool=None`` keeps the pooling, and nothing else stands in the head."""
        clip = isinstance(self.head, ClipHead)
        assert clip or global_pool != "attn", "Pooling by attention belongs to the clip projector."
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last map that is asked for, and the head; returns the maps' indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if prune_head or max_index < len(self.stages) - 1:
            self.stages = self.stages[: max_index + 1]
            self.num_classes, self.num_features = 0, self.feature_info[max_index]["num_chs"]
            self.fusion, self.conv_head = None, nn.Identity()
            self.head = ClassifierHead(self.num_features, 0, "", self.drop_rate).train(self.training)
            self.head_hidden_size = self.head.num_features
        return take_indices

    def behind_stages(self, before: Tensor, last: Tensor) -> Tensor:
        """The last map (stride 32), with the clip projector the last two joined (stride 16)."""
        return last if self.fusion is None else self.fusion(before, last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map -> (N, num_classes); with ``pre_logits`` (N, head_hidden_size)."""
        return self.head(self.conv_head(x), pre_logits=pre_logits)


def _downsample(dim: int, out_dim: int, **dd: Any) -> nn.Module:
    layers = {
        "conv": nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **dd),
        "norm": LayerNorm2d(out_dim, **dd),
    }
    return nn.Sequential(OrderedDict(layers))


def _check(depths: tuple[int, ...], groups: tuple[int, ...], after: tuple[int, ...]) -> None:
    if len(groups) != len(depths):
        raise GraftError(
            f"internimage: depths={tuple(depths)} names {len(depths)} stages and groups={tuple(groups)} {len(groups)}"
        )
    blocks = depths[2] if len(depths) > 2 else 0
    if wrong := [block for block in after if not 0 <= block < blocks]:
        raise GraftError(
            f"internimage: level2_post_norm_block_ids names block {wrong[0]}; the third stage has {blocks} blocks"
        )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, DCNv3):
        module.init_weights()


def runs_with() -> str:
    """What computes DCNv3 on this machine."""
    return "; ".join(f"{name}: {words}" for name, _, words in describe())


_RENAMED = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^patch_embed\.(conv\d)\.", r"stem.\1."),
        (r"^patch_embed\.(norm\d)\.1\.", r"stem.\1."),
        (r"^(levels\.\d+\.post_norms\.\d+)\.0\.", r"\1."),
        (r"^(levels\..*norm\d?)\.[01]\.", r"\1."),
        (r"\.dw_conv\.1\.1\.", ".dw_conv.1."),
        (r"\.center_feature_scale_proj_", ".center_feature_scale_proj."),
        (r"\.(?:gamma|layer_scale)(\d)$", r".ls\1.gamma"),
        (r"^levels\.", "stages."),
        (r"^conv_head\.0\.", "conv_head.conv."),
        (r"^conv_head\.1\.0\.", "conv_head.norm."),
        (r"^dcnv3_head_x3\.", "fusion.fine."),
        (r"^dcnv3_head_x4\.0\.", "fusion.deep."),
        (r"^clip_projector\.norm1_([qkv])\.0\.", r"head.global_pool.norm_\1."),
        (r"^clip_projector\.cross_dcn\.([qkv])_bias$", r"head.global_pool.\1.bias"),
        (r"^clip_projector\.cross_dcn\.", "head.global_pool."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        (r"^clip\.classifier\.", "head.fc."),
        (r"^(?:fc_norm(?:\.0)?|clip\.classifier_ln)\.", "head.norm."),
    )
]
"""Patterns of published keys and what becomes of them, applied one after the other."""

_STEM = "patch_embed.conv1.weight"
_PARTS = re.compile(
    r"^(patch_embed|levels|conv_head|dcnv3_head_x[34]|clip_projector|fc_norm|head|clip\.classifier\w*)\."
)
"""What belongs to the network in a file that holds more."""


def official_name(key: str) -> str | None:
    """Our key for one of the published code (or of its port to transformers); nothing is dropped."""
    for pattern, ours in _RENAMED:
        key = pattern.sub(ours, key)
    step = re.match(r"stages\.(\d+)\.downsample\.", key)
    return f"stages.{int(step[1]) + 1}{key[step.end(1) :]}" if step else key


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint or one of ours as a state dict of ``model``.

    Understood are files of classification, of detection and segmentation (whose head ``model`` keeps as it is), of
    the joint training of the two largest sizes, and of the port to transformers.
    """
    state = unwrapped(state_dict)
    roots = [key.removesuffix(_STEM) for key in state if key.endswith(_STEM) and "teacher" not in key]
    if not roots:
        return state
    root = min(roots, key=len)
    bare = {key.removeprefix(root): value for key, value in state.items()}
    found = {official_name(key): value for key, value in bare.items() if _PARTS.match(key)}
    converted = {key: value for key, value in found.items() if key is not None}
    own = model.state_dict()
    if not any(key.startswith(("conv_head.", "fusion.")) for key in converted):
        converted |= {key: own[key] for key in own if key.startswith(("conv_head.", "fusion.", "head."))} | converted
    return _with_layer_scale_as_in(own, converted)


def _with_layer_scale_as_in(own: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Layer scales that only the model has are ones; what only the file has goes into the layer before it."""
    missing = {key: torch.ones_like(value) for key, value in own.items() if ".ls" in key and key not in state}
    state = {**state, **missing}
    for key in [k for k in state if re.search(r"\.ls\d\.gamma$", k) and k not in own]:
        block, number = key.removesuffix(".gamma").rsplit(".ls", 1)
        before = f"{block}.{ {'1': 'dcn.output_proj', '2': 'mlp.fc2'}[number] }"
        gamma = state.pop(key)
        state[f"{before}.weight"] = gamma[:, None] * state[f"{before}.weight"]
        state[f"{before}.bias"] = gamma * state[f"{before}.bias"]
    return state


_cfg = partial(
    untrained_cfg,
    first_conv="stem.conv1",
    paper_ids="arXiv:2211.05778",
    paper_name="InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions",
    origin_url="https://github.com/OpenGVLab/InternImage",
    license="mit",
)


default_cfgs = generate_default_cfgs(
    {
        "internimage_tiny.in1k": _cfg(),
        "internimage_small.in1k": _cfg(),
        "internimage_base.in1k": _cfg(),
        "internimage_large.in22k_ft_in1k": _cfg(384),
        "internimage_xlarge.in22k_ft_in1k": _cfg(384),
        "internimage_huge.joint_in22k_ft_in1k": _cfg(640, pool_size=(40, 40)),
        "internimage_giant.joint_in22k_ft_in1k": _cfg(512, pool_size=(32, 32)),
        "test_internimage.untrained": _cfg(64),
        "test_internimage_clip.untrained": _cfg(64, pool_size=(4, 4)),
    }
)

_JOINT = "427M images, ImageNet-22K"

PUBLISHED: dict[str, Published] = {
    "internimage_tiny": Published(29_918_424, 4.786, (64, 128, 256, 512), top1=83.5),
    "internimage_small": Published(50_079_880, 8.173, (80, 160, 320, 640), top1=84.2),
    "internimage_base": Published(97_461_832, 15.997, (112, 224, 448, 896), top1=84.9),
    "internimage_large": Published(
        223_334_810, 106.89, (160, 320, 640, 1280), top1=87.7, side=384, data="ImageNet-22K"
    ),
    "internimage_xlarge": Published(
        334_819_780, 161.80, (192, 384, 768, 1536), top1=88.0, side=384, data="ImageNet-22K"
    ),
    "internimage_huge": Published(1_089_636_760, 1486.3, (320, 640, 1280, 2560), top1=89.6, side=640, data=_JOINT),
    "internimage_giant": Published(3_076_373_352, 2705.2, (512, 1024, 2048, 4096), top1=90.1, side=512, data=_JOINT),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> InternImage:
    return build_model_with_cfg(
        InternImage,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


_POST: dict[str, Any] = {"layer_scale": 1e-5, "post_norm": True}
_CLIP: dict[str, Any] = {
    "dw_kernel_size": 5,
    "center_feature_scale": True,
    "use_clip_projector": True,
    "global_pool": "attn",
}
_SMALL: dict[str, Any] = {"channels": 8, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "mlp_ratio": 2.0}


@register_backbone
def internimage_tiny(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-T: 29.9 million parameters, 4.8 GMACs."""
    return _create("internimage_tiny", pretrained, **kwargs)


@register_backbone
def internimage_small(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-S: 50.1 million parameters, 8.2 GMACs."""
    size = {"channels": 80, "depths": (4, 4, 21, 4), "groups": (5, 10, 20, 40), **_POST}
    return _create("internimage_small", pretrained, **{**size, **kwargs})


@register_backbone
def internimage_base(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-B: 97.5 million parameters, 16.0 GMACs."""
    size = {"channels": 112, "depths": (4, 4, 21, 4), "groups": (7, 14, 28, 56), **_POST}
    return _create("internimage_base", pretrained, **{**size, **kwargs})


@register_backbone
def internimage_large(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-L: 223 million parameters, 107 GMACs at 384 pixels."""
    size = {"channels": 160, "depths": (5, 5, 22, 5), "groups": (10, 20, 40, 80), "offset_scale": 2.0, **_POST}
    return _create("internimage_large", pretrained, **{**size, **kwargs})


@register_backbone
def internimage_xlarge(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-XL: 335 million parameters, 162 GMACs at 384 pixels."""
    size = {"channels": 192, "depths": (5, 5, 24, 5), "groups": (12, 24, 48, 96), "offset_scale": 2.0, **_POST}
    return _create("internimage_xlarge", pretrained, **{**size, **kwargs})


@register_backbone
def internimage_huge(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-H: 1.09 billion parameters, 1486 GMACs at 640 pixels."""
    size = {
        "channels": 320,
        "depths": (6, 6, 32, 6),
        "groups": (10, 20, 40, 80),
        "res_post_norm": True,
        "level2_post_norm_block_ids": (5, 11, 17, 23, 29),
        **_CLIP,
    }
    return _create("internimage_huge", pretrained, **{**size, **kwargs})


@register_backbone
def internimage_giant(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """InternImage-G: 3.08 billion parameters, 2705 GMACs at 512 pixels."""
    size = {
        "channels": 512,
        "depths": (2, 2, 48, 4),
        "groups": (16, 32, 64, 128),
        "post_norm": True,
        "level2_post_norm_block_ids": (5, 11, 17, 23, 29, 35, 41, 47),
        **_CLIP,
    }
    return _create("internimage_giant", pretrained, **{**size, **kwargs})


@register_backbone
def test_internimage(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """A very small one for tests, like small to xlarge: norms behind the branches, layer scale, wide grid."""
    size = {**_SMALL, "offset_scale": 2.0, **_POST}
    return _create("test_internimage", pretrained, **{**size, **kwargs})


@register_backbone
def test_internimage_clip(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """A very small one for tests, like huge: norms on both sides, centre scale, a head that joins two maps."""
    size = {
        **_SMALL,
        "res_post_norm": True,
        "level2_post_norm_block_ids": (0,),
        "clip_dim": 16,
        "clip_num_heads": 4,
        "clip_out_dim": 16,
        **_CLIP,
    }
    return _create("test_internimage_clip", pretrained, **{**size, **kwargs})
