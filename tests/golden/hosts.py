"""The plain backbones of the golden cases, built from a case's config with timm's own classes.

They come without a classifier (``num_classes=0``): the head of a case belongs to its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import GroupNormAct, StdConv2d, get_act_layer, get_norm_act_layer
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import Bottleneck, ResNet, make_blocks
from timm.models.resnetv2 import PreActBottleneck, ResNetStage, ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .files import CaseError

Config = Mapping[str, Any]


def resnet(config: Config) -> ResNet:
    """Bottleneck ResNet v1.5; ``planes`` are the bottleneck widths, outputs are four times as wide."""
    if config["block"] != "bottleneck":
        raise ValueError(f"resnet: unknown block {config['block']!r}, expected 'bottleneck'")
    planes, stem = tuple(config["planes"]), config["stem_width"]
    model = ResNet(Bottleneck, layers=tuple(config["layers"]), channels=planes, num_classes=0)
    if stem != model.bn1.num_features:  # timm fixes a plain stem at 64 channels
        model.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
        model.bn1 = nn.BatchNorm2d(stem)
        stages, _ = make_blocks(
            (Bottleneck,) * len(planes),
            planes,
            tuple(config["layers"]),
            stem,
            cardinality=1,
            base_width=64,
            act_layer=nn.ReLU,
            norm_layer=nn.BatchNorm2d,
        )
        model.layer1 = dict(stages)["layer1"]
    return model


def resnetv2(config: Config) -> ResNetV2:
    """Pre-activation ResNet with weight-standardised convolutions and GroupNorm(32): BiT."""
    outs, mids, units = config["out_channels"], config["mid_channels"], config["units"]
    conv = partial(StdConv2d, eps=1e-10)
    norm = get_norm_act_layer(partial(GroupNormAct, num_groups=32), act_layer=nn.ReLU)
    model = ResNetV2(
        layers=units,
        channels=tuple(outs),
        num_classes=0,
        stem_chs=config["stem_width"],
        stem_type="fixed",
        bottle_ratio=1.0,
        conv_layer=conv,
    )
    width = config["stem_width"]
    for i, (out, mid, depth) in enumerate(zip(outs, mids, units, strict=True)):
        # The stages again: timm has one bottleneck ratio for the whole network, and projects the first skip of
        # every stage.
        stage = ResNetStage(
            width,
            out,
            stride=1 if i == 0 else 2,
            dilation=1,
            depth=depth,
            bottle_ratio=mid / out,
            block_fn=PreActBottleneck,
            act_layer=nn.ReLU,
            conv_layer=conv,
            norm_layer=norm,
        )
        if i == 0 and width == out:
            stage.blocks[0].downsample = None
        model.stages[i] = stage
        width = out
    return model


def convnext(config: Config) -> ConvNeXt:
    """ConvNeXt with 7x7 depthwise convolutions."""
    if config["downsample_kernel"] != 2:
        raise ValueError(f"convnext: downsample_kernel is {config['downsample_kernel']}, expected 2")
    return ConvNeXt(
        depths=tuple(config["depths"]),
        dims=tuple(config["dims"]),
        ls_init_value=1e-6 if config["layer_scale"] else None,
        norm_eps=config["norm_eps"],
        num_classes=0,
    )


def vit(config: Config) -> VisionTransformer:
    """Vision transformer with exact GELU that reads out its class token; keys that a case leaves out are timm's."""
    if config.get("act", "gelu") != "gelu" or config.get("pool", "token") != "token":
        raise CaseError(f"vit: act {config['act']!r} and pool {config['pool']!r}; expected 'gelu' and 'token'")
    return VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        init_values=1e-6 if config.get("layer_scale") else None,
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
        num_classes=0,
    )


def swin(config: Config) -> SwinTransformer:
    """Swin transformer; stochastic depth is inactive in every case."""
    return SwinTransformer(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depths=tuple(config["depths"]),
        num_heads=tuple(config["num_heads"]),
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
        drop_path_rate=0.0,
        num_classes=0,
    )


def efficientnetv2(config: Config) -> EfficientNet:
    """EfficientNet from timm block strings; ``pad_type`` "same" is the TensorFlow padding."""
    return EfficientNet(
        block_args=decode_arch_def([list(stage) for stage in config["arch"]]),
        num_features=config["num_features"],
        stem_size=config["stem_size"],
        pad_type=config["pad_type"],
        act_layer=get_act_layer("silu"),
        norm_layer=partial(nn.BatchNorm2d, eps=config["bn_eps"]),
        num_classes=0,
    )
