"""What is known about a backbone by its name alone: size, work, maps, published accuracy."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import timm
import torch

from ..lean.meter import flops
from . import timm_api
from .provenance import data_config_of
from .published import Published
from .taps import correct_taps


@dataclasses.dataclass(frozen=True)
class Facts:
    """One row of ``torchgraft list backbones``; None and empty where nothing is known.

    Attributes:
        name: Name for :func:`torchgraft.backbones.create_backbone`.
        parameters: Parameters with its own classifier.
        gmacs: Multiply-adds of one forward of one image of ``side`` pixels, in units of 1e9.
        top1: Published ImageNet-1K accuracy in per cent.
        side: Side of the images, in pixels.
        data: What it was pretrained on before ImageNet-1K, for ``top1``.
        channels: Channels of its maps, from high to low resolution.
        strides: Strides of these maps.
        runs_with: Memory mode or operator that is in use here.
    """

    name: str
    parameters: int | None = None
    gmacs: float | None = None
    top1: float | None = None
    side: int | None = None
    data: str = ""
    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    runs_with: str = ""


def published_facts(name: str) -> Facts | None:
    """The record of one of our own architectures, None for all other names."""
    module = _our_module(name)
    published: Published | None = module.PUBLISHED.get(name) if module else None
    if published is None:
        return None
    runs_with = getattr(module, "runs_with", str)
    return Facts(name, **dataclasses.asdict(published), runs_with=runs_with())


def counted_facts(name: str) -> Facts:
    """What a timm model without weights or memory tells; :class:`Facts` with a name alone where it cannot be built."""
    try:
        with torch.device("meta"):
            model = correct_taps(timm.create_model(name)).eval()
            channels, side = data_config_of(model)["input_size"][:2]
            images = torch.empty(1, channels, side, side)
        parameters = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            gmacs = flops(lambda: model(images)) / 2e9
    except Exception:
        # Some constructors and operators of timm's thousand models do not work without memory behind the tensors.
        return Facts(name)
    taps = [tap for tap in timm_api.tap_infos(model) if tap["reduction"] >= 4]
    last = {tap["reduction"]: tap["num_chs"] for tap in taps}
    return Facts(
        name,
        parameters=parameters,
        gmacs=round(gmacs, 3),
        side=side,
        channels=tuple(last.values()),
        strides=tuple(last),
    )


def _our_module(name: str) -> Any:
    if not timm.is_model(name):
        return None
    module = sys.modules.get(timm.model_entrypoint(name).__module__)
    return module if module and module.__name__.rpartition(".")[0] == timm_api.__package__ else None
