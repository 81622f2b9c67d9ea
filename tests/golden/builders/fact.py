"""Builders of the system ``fact``: our methods on a small ViT. ``dropout`` acts in no case, so it is off."""

from __future__ import annotations

from torchgraft import Method
from torchgraft.methods.fact import FacTTK, FacTTT
from torchgraft.official.fact import FacTCode

from .. import hosts
from ..adapted import AdaptedNetwork
from ..case import Config, GoldenCase, Tensors
from ..files import CaseError


def tt(config: Config, mode: str) -> GoldenCase:
    if config["layout"] != "official":
        raise CaseError(f"tt: unknown layout {config['layout']!r}, expected 'official'")
    return _network(config, mode, FacTTT(rank=config["rank"], scale=config["scale"], dropout=0.0))


def tk(config: Config, mode: str) -> GoldenCase:
    if config["layout"] not in ("official", "paper"):
        raise CaseError(f"tk: unknown layout {config['layout']!r}, expected 'official' or 'paper'")
    options = {key: config[key] for key in ("rank", "scale", "layout")}
    return _network(config, mode, FacTTK(**options, dropout=0.0))


FORMS = {"tt": tt, "tk": tk}


class VitWithoutFeatures(AdaptedNetwork):
    """``logits`` and the outputs of the blocks."""

    def run(self, inputs: Tensors) -> Tensors:
        return {name: tensor for name, tensor in super().run(inputs).items() if name != "features"}


def _network(config: Config, mode: str, method: Method) -> GoldenCase:
    vit = config["vit"]
    host = hosts.vit(vit)
    return VitWithoutFeatures(
        host,
        FacTCode(host),
        num_classes=vit["num_classes"],
        mode=mode,
        method=method,
        blocks={f"block{i}": f"blocks.{i}" for i in range(vit["depth"])},
    )
