"""Builders of the system ``hornet``: the classifier, and the backbone of its detectors with a norm on every map."""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from torchgraft.backbones.hornet import HorNet, official_name
from torchgraft.errors import GraftError

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase, StateError, Tensors
from ..files import CaseError

_TRUNK = "trunk"


def classifier(config: Config, mode: str) -> GoldenCase:
    stages = range(len(config["depths"]))
    down = {f"down{i}": f"stages.{i}.downsample" if i else "stem" for i in stages}
    outputs = {**down, **{f"stage{i}": f"stages.{i}" for i in stages}, "pre_logits": "head.drop"}
    return BackboneCase(_network(config), official_name, outputs, optional=down)


def dense(config: Config, mode: str) -> GoldenCase:
    if config["num_classes"] != 0:
        raise CaseError(f"hornet: form 'dense' has no classifier, but num_classes is {config['num_classes']}")
    return DenseCase(Dense(_network(config), config["out_indices"], config["norm_eps"]), _dense_name)


FORMS = {"classifier": classifier, "dense": dense}


class Dense(nn.Module):
    """Maps behind the stages of ``out_indices``, each through a layer norm of its own: ``norm0``, ``norm1``, ..."""

    def __init__(self, network: HorNet, out_indices: list[int], norm_eps: float) -> None:
        super().__init__()
        network.prune_intermediate_layers([len(network.stages) - 1])  # the head
        self.trunk, self.out_indices = network, out_indices
        for i in out_indices:
            self.add_module(f"norm{i}", LayerNorm2d(network.feature_info[i]["num_chs"], eps=norm_eps))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        maps = self.trunk.forward_intermediates(image, self.out_indices, intermediates_only=True)
        found = zip(self.out_indices, maps, strict=True)
        return {f"out{i}": self.get_submodule(f"norm{i}")(x) for i, x in found}


class DenseCase(BackboneCase):
    """The normed maps; no loss is defined for them."""

    def forward(self, inputs: Tensors) -> Tensors:
        return self.model(inputs["image"])

    def loss(self, outputs: Tensors) -> Tensor:
        raise StateError("hornet: form 'dense' has no loss")


def _dense_name(key: str) -> str | None:
    name = official_name(key)
    return name if name is None or name.startswith("norm") else f"{_TRUNK}.{name}"


def _network(config: Config) -> HorNet:
    return _built(
        in_chans=config["in_chans"],
        num_classes=config["num_classes"],
        depths=config["depths"],
        base_dim=config["base_dim"],
        orders=config["orders"],
        gf_sizes=[_size(found) for found in config["gf_sizes"]],
        gn_scale=config["gn_scale"],
        mlp_ratio=config["mlp_ratio"],
        ls_init_value=1e-6 if _flag(config, "layer_scale") else None,
        norm_eps=config["norm_eps"],
        drop_path_rate=_inactive(config["drop_path_rate"]),
    )


def _built(**options: Any) -> HorNet:
    try:
        return HorNet(**options)
    except (GraftError, ValueError, TypeError) as error:
        raise CaseError(f"hornet: {error}") from error


def _size(found: Any) -> tuple[int, int] | None:
    if found is None:
        return None
    if isinstance(found, list) and len(found) == 2:
        return found[0], found[1]
    raise CaseError(f"hornet: gf_sizes holds {found!r}; expected null or [h, w]")


def _flag(config: Config, key: str) -> bool:
    if not isinstance(config[key], bool):
        raise CaseError(f"hornet: {key} is {config[key]!r}; expected true or false")
    return config[key]


def _inactive(rate: Any) -> float:
    """The rate at which our case drops paths: none does, whatever the published constructor was given."""
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise CaseError(f"hornet: drop_path_rate is {rate!r}; expected a number from 0 up to 1")
    return 0.0
