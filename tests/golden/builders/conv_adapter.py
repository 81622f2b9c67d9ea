"""Builders of the system ``conv_adapter``: our method Conv-Adapter, preset "official", on small backbones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from torchgraft import ConvAdapter, Method
from torchgraft.core import Anatomy
from torchgraft.core.layers import ConvGeometry
from torchgraft.core.placements import Parallel, Placement, Point
from torchgraft.methods.forms import ConvBottleneck, LinearBottleneck
from torchgraft.official.conv_adapter import ConvAdapterCode

from .. import hosts
from ..adapted import AdaptedNetwork
from ..case import Config, GoldenCase
from ..clip_resnet import ClipResNet
from ..files import CaseError
from ..modules_case import ModulesCase

SCHEMES = {
    "conv_parallel": "conv-parallel",
    "conv_sequential": "conv-sequential",
    "residual_parallel": "residual-parallel",
    "residual_sequential": "residual-sequential",
    "attention_parallel": "auto",  # what our method does on transformer blocks
}
ADD_POINTS = {"conv": "conv", "post_act": "post-act", "post_attn": "auto"}


def modules(config: Config, mode: str) -> GoldenCase:
    """The two published forms on their own."""
    made = {name: _module(entry) for name, entry in config["modules"].items()}
    return ModulesCase(made, lambda key: "scale" if key == "se" else key)


def resnet(config: Config, mode: str) -> GoldenCase:
    return _network(hosts.resnet(config), official(config), config, mode)


def convnext(config: Config, mode: str) -> GoldenCase:
    if config["kernel"] not in (7, "match"):
        raise CaseError(f"convnext: kernel {config['kernel']!r}; expected 7, as in the blocks, or 'match'")
    # "match" follows both the blocks' convolutions and those between the stages.
    method = official({**config, "kernel": "match"})
    return _network(hosts.convnext(config), method, config, mode)


def swin(config: Config, mode: str) -> GoldenCase:
    return _network(hosts.swin(config), official(config), config, mode)


def bit(config: Config, mode: str) -> GoldenCase:
    return _network(hosts.resnetv2(config), official(config), config, mode)


def efficientnetv2(config: Config, mode: str) -> GoldenCase:
    return _network(hosts.efficientnetv2(config), official(config), config, mode)


def clip_resnet(config: Config, mode: str) -> GoldenCase:
    host = ClipResNet(config)
    method: Method = official(config)
    if config["attnpool_adapter"]:
        width = host.attnpool.c_proj.in_features
        method = WithAttentionPool(method, int(width / config["gamma"]), config["act"])
    return _network(host, method, config, mode)


FORMS = {
    "modules": modules,
    "resnet": resnet,
    "convnext": convnext,
    "swin": swin,
    "bit": bit,
    "efficientnetv2": efficientnetv2,
    "clip_resnet": clip_resnet,
}


def official(config: Config) -> ConvAdapter:
    """Our method with everything the config fixes, and the published behaviour for the rest."""
    return ConvAdapter(
        preset="official",
        reduction=config["gamma"],
        scheme=_known("scheme", config["scheme"], SCHEMES),
        add_point=_known("add_point", config["add_point"], ADD_POINTS) if "add_point" in config else "auto",
        kernel=config["kernel"],
        act=config["act"],
    )


@dataclasses.dataclass(frozen=True)
class WithAttentionPool(Method):
    """A method, and the linear adapter from the positioned tokens to the output of the attention pool.

    Attributes:
        method: What is attached to the rest of the network.
        width: Bottleneck width of the linear adapter.
        act: Its activation.
    """

    name: ClassVar[str] = "with-attention-pool"
    method: Method
    width: int
    act: str

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        out = anatomy.module("attnpool.c_proj")
        form = LinearBottleneck(out.in_features, out.out_features, self.width, act=self.act)
        source, target = Point("attnpool.tokens", "output"), Point("attnpool.c_proj", "output")
        return [*self.method.placements(anatomy), Parallel(form, source, target)]


def _network(host: nn.Module, method: Method, config: Config, mode: str) -> AdaptedNetwork:
    return AdaptedNetwork(
        host,
        ConvAdapterCode(host),
        num_classes=config["num_classes"],
        mode=mode,
        method=method,
        counts=lambda p: isinstance(getattr(p, "form", None), (ConvBottleneck, LinearBottleneck)),
    )


def _module(entry: Config) -> nn.Module:
    match entry["type"]:
        case "conv":
            size = {key: (entry[key],) * 2 for key in ("kernel", "stride", "padding")}
            geometry = ConvGeometry(dims=2, dilation=(1, 1), **size)
            return ConvBottleneck(
                entry["in_channels"], entry["out_channels"], entry["width"], geometry, act=entry["act"]
            )
        case "linear":
            return LinearBottleneck(entry["in_features"], entry["out_features"], entry["width"], act=entry["act"])
        case other:
            raise CaseError(f"unknown module type {other!r}, expected 'conv' or 'linear'")


def _known(key: str, value: Any, options: Mapping[str, Any]) -> Any:
    if value not in options:
        raise CaseError(f"unknown {key} {value!r}, expected one of {sorted(options)}")
    return options[value]
