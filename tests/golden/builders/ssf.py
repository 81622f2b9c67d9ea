"""Builders of the system ``ssf``: our method SSF as published, on small ViTs, Swins and ConvNeXts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from torchgraft.core.layers import is_conv
from torchgraft.methods.ssf import SSF
from torchgraft.official.ssf import SSFCode

from .. import hosts
from ..adapted import AdaptedNetwork
from ..case import Config, GoldenCase, Merged, Tensors
from ..files import CaseError


class SSFNetwork(AdaptedNetwork):
    """An adapted network whose merged form has biases that the plain one lacks (a qkv without)."""

    def convert(self, tensors: Mapping[str, Tensor]) -> Tensors:
        missing = {k for k in tensors if self._is_missing_bias(k)}
        known = super().convert({k: t for k, t in tensors.items() if k not in missing})
        return known | {f"backbone.{k}": tensors[k] for k in missing}

    def merged(self, inputs: Tensors) -> Merged:
        # A scale is no increment of a weight: the cases hold the folded weights alone.
        return dataclasses.replace(super().merged(inputs), deltas={})

    def _is_missing_bias(self, key: str) -> bool:
        path, _, leaf = key.rpartition(".")
        module = dict(self._model.named_modules()).get(path)
        layer = module is not None and (is_conv(module) or isinstance(module, nn.Linear))
        return layer and leaf == "bias" and key not in self._backbone and not path.startswith("head")


def vit(config: Config, mode: str) -> GoldenCase:
    return _network(hosts.vit(config), config, mode)


def swin(config: Config, mode: str) -> GoldenCase:
    return _network(hosts.swin(config), config, mode)


def convnext(config: Config, mode: str) -> GoldenCase:
    return _network(hosts.convnext({**config, "downsample_kernel": 2}), config, mode)


FORMS = {"vit": vit, "swin": swin, "convnext": convnext}


def _network(host: nn.Module, config: Config, mode: str) -> GoldenCase:
    sites = config["sites"]
    if sites not in ("official", "all"):
        raise CaseError(f"ssf: unknown sites {sites!r}, expected 'official' or 'all'")
    method = SSF(preset="official", sites=sites)
    return SSFNetwork(host, SSFCode(host), num_classes=config["num_classes"], mode=mode, method=method)
