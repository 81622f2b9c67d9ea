"""Builders of the system ``vpt``: prompts on ViT, MAE, Swin and ConvNets, with the oddities of the published code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from torchgraft import Method
from torchgraft.core.head import HEAD_SLOT
from torchgraft.methods.vpt import VPTDeep, VPTShallow
from torchgraft.methods.vpt_add import VPTAdd
from torchgraft.methods.vpt_image import VPTBelow, VPTPad
from torchgraft.official.vpt import VPTCode

from .. import hosts
from ..adapted import AdaptedNetwork
from ..case import Config, GoldenCase
from ..files import CaseError

POOLS = {"original": "patches", "imgprompt_pool": "all", "img_pool": "patches", "prompt_pool": "prompts"}
"""What is averaged; ``original`` reads the class token on ViT and averages everything on MAE."""
STARTS = {
    "prepend-pixel": "pixel",
    "prepend-pixel-gaussian": "pixel-gaussian",
    "prepend-pixel-imgnettransform": "pixel-imagenet",
}
NORMS = {"imagenet": "random", None: "gaussian"}


def vit(config: Config, mode: str) -> GoldenCase:
    return _vit(config, mode, pool=_known("pool", config["pool"], POOLS), fc_norm=False)


def mae_vit(config: Config, mode: str) -> GoldenCase:
    pool = "all" if config["pool"] == "original" else _known("pool", config["pool"], POOLS)
    return _vit({**config, "pool": config["pool"].replace("original", "imgprompt_pool")}, mode, pool=pool, fc_norm=True)


def swin(config: Config, mode: str) -> GoldenCase:
    _known("location", config["location"], {"prepend": None})
    method = VPTDeep if config["deep"] else VPTShallow
    return _network(hosts.swin(config), method(num_tokens=config["num_tokens"]), config, mode)


def convnext(config: Config, mode: str) -> GoldenCase:
    _known("location", config["location"], {"pad": None})
    return _network(hosts.convnext({**config, "downsample_kernel": 2, "norm_eps": 1e-6}), _pad(config), config, mode)


def resnet(config: Config, mode: str) -> GoldenCase:
    made = _known("location", config["location"], {"pad": _pad, "below": _below})
    return _network(hosts.resnet(config), made(config), config, mode)


FORMS = {"vit": vit, "mae_vit": mae_vit, "swin": swin, "convnext": convnext, "resnet": resnet}


def _vit(config: Config, mode: str, *, pool: str, fc_norm: bool) -> GoldenCase:
    location, size = config["location"], config["img_size"]
    framed = location == "pad"
    host = VisionTransformer(
        img_size=size + 2 * config["num_tokens"] if framed else size,
        # The image that the network is given is smaller than the one it embeds.
        dynamic_img_size=framed,
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_dim"] / config["embed_dim"],
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
        global_pool="token" if config["pool"] == "original" else "avg",
        fc_norm=fc_norm,
        num_classes=0,
    )
    told = {"shared": config["deep_shared"], "reverse": config["reverse_deep"], "num_layers": config["num_deep_layers"]}
    return _network(host, _beside_patches(config, pool), config, mode, **told)


def _beside_patches(config: Config, pool: str) -> Method:
    location, tokens = config["location"], config["num_tokens"]
    depth: dict[str, Any] = {
        "num_layers": config["num_deep_layers"],
        "reverse": config["reverse_deep"],
        "shared": config["deep_shared"],
    }
    if location == "prepend" and config["deep"]:
        noexpand = config["forward_deep_noexpand"]
        return VPTDeep(
            num_tokens=tokens, project=config["project"], noexpand=noexpand, pool=pool, official=True, **depth
        )
    if location == "prepend":
        return VPTShallow(num_tokens=tokens, project=config["project"], pool=pool)
    if location in STARTS:
        return VPTShallow(num_tokens=tokens, start=STARTS[location], pool=pool)
    if location in ("add", "add-1"):
        deep = depth if config["deep"] else {}
        return VPTAdd(location=location, deep=config["deep"], project=config["project"], **deep)
    if location == "pad":
        return VPTPad(prompt_size=tokens, image_size=config["img_size"])
    if location == "below":
        return VPTBelow(num_channels=tokens, image_size=config["img_size"], start="uniform")
    raise CaseError(f"unknown location {location!r}")


def _pad(config: Config) -> Method:
    start = _known("prompt_norm", config["prompt_norm"], NORMS)
    return VPTPad(prompt_size=config["prompt_size"], image_size=config["crop_size"], start=start)


def _below(config: Config) -> Method:
    start = _known("prompt_norm", config["prompt_norm"], NORMS)
    return VPTBelow(num_channels=config["prompt_size"], image_size=config["crop_size"], start=start)


def _network(host: nn.Module, method: Method, config: Config, mode: str, **options: Any) -> AdaptedNetwork:
    location = "pixel" if config["location"] in STARTS else config["location"]
    # The reference counts what has "prompt" in its name: ResNet's prompt_layers, but not a ViT's patch embedding.
    inside = location == "below" and config["form"] != "resnet"
    return AdaptedNetwork(
        host,
        VPTCode(host, location=location, **options),
        num_classes=config["num_classes"],
        mode=mode,
        method=method,
        counts=lambda p: p.slot != HEAD_SLOT and not (inside and p.kind == "train"),
    )


def _known(key: str, value: Any, options: Mapping[Any, Any]) -> Any:
    if value not in options:
        raise CaseError(f"unknown {key} {value!r}, expected one of {sorted(options, key=str)}")
    return options[value]
