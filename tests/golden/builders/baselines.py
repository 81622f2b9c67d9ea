"""Builders of the system ``baselines``: RepNet, and the small modules of the published baselines."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from timm.models.resnet import ResNet
from torch import nn

from torchgraft import Combination, Method
from torchgraft.core import Anatomy
from torchgraft.core.placements import Placement, Point, Sequential
from torchgraft.methods.forms.program_module import ProgramModule, StandardisedConv2d
from torchgraft.methods.pad_prompt import PadFrame
from torchgraft.methods.repnet import RepNet
from torchgraft.official.baselines import RepNetCode

from .. import hosts
from ..adapted import AdaptedNetwork
from ..case import Config, GoldenCase
from ..files import CaseError
from ..modules_case import ModulesCase


def modules(config: Config, mode: str) -> GoldenCase:
    """Program modules, pad prompters and weight-standardised convolutions on their own."""
    made = {name: _module(entry) for name, entry in config["modules"].items()}
    return ModulesCase(made, lambda key: key.removeprefix("encoder.").removeprefix("pad_"))


def repnet_resnet(config: Config, mode: str) -> GoldenCase:
    """RepNet as the published Conv-Adapter code has it; its quirks are flags here.

    Side 1 is added twice, and with ``weight_standardised`` the convolutions of the frozen backbone are
    standardised too. The library does the latter to side networks only, so the backbone is built that way.
    """
    host = hosts.resnet(config)
    if config["weight_standardised"]:
        _standardise(host)
    sides = RepNet(
        expand=config["expand"],
        kernel=config["kernel"],
        image_size=config["image_size"],
        twice=True,
        standardise=config["weight_standardised"],
    )
    return AdaptedNetwork(
        host,
        RepNetCode(host),
        num_classes=config["num_classes"],
        mode=mode,
        method=Combination((sides, NormBeforePooling())),
        counts=lambda p: isinstance(getattr(p, "form", None), ProgramModule),
    )


FORMS = {"modules": modules, "repnet_resnet": repnet_resnet}


@dataclasses.dataclass(frozen=True)
class NormBeforePooling(Method):
    """The BatchNorm that the published code adds to every ResNet, on the last map before pooling."""

    name: ClassVar[str] = "norm-before-pooling"

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        last = Point("layer4", "output")
        return [Sequential(nn.BatchNorm2d(anatomy.shape(last)[1]), last, skip=False, slot="norm")]


def _module(entry: Config) -> nn.Module:
    match entry["type"]:
        case "program_module":
            down, up = entry["downsample"], entry["upsample"]
            return ProgramModule(
                entry["in_channels"],
                entry["out_channels"],
                expand=entry["expand"],
                kernel=entry["kernel"],
                groups=entry["groups"],
                pool=down or 2,
                ratio=up if down is None else down // up,
            )
        case "pad_prompter":
            return PadFrame(entry["prompt_size"], 3, entry["image_size"], entry["image_size"])
        case "ws_conv":
            return StandardisedConv2d(
                entry["in_channels"],
                entry["out_channels"],
                entry["kernel"],
                stride=entry["stride"],
                padding=entry["padding"],
                groups=entry["groups"],
                bias=False,
                eps=entry["eps"],
            )
        case other:
            kinds = "'program_module', 'pad_prompter' or 'ws_conv'"
            raise CaseError(f"unknown module type {other!r}, expected {kinds}")


def _standardise(host: ResNet) -> None:
    """Replace every convolution without a bias by a weight-standardised one of the same geometry."""
    for path, conv in list(host.named_modules()):
        if isinstance(conv, nn.Conv2d) and conv.bias is None:
            host.set_submodule(
                path,
                StandardisedConv2d(
                    conv.in_channels,
                    conv.out_channels,
                    conv.kernel_size,
                    stride=conv.stride,
                    padding=conv.padding,
                    groups=conv.groups,
                    bias=False,
                ),
            )
