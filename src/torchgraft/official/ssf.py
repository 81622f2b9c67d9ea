"""SSF's official code (dongzelian/SSF, commit e94e0e7): its own copies of ViT, Swin and ConvNeXt, after timm 0.6.5.

A module keeps the pairs behind its layers as numbered parameters, in the order in which the layers run:
``blocks.3.mlp.ssf_scale_2`` scales what ``blocks.3.mlp.fc2`` returns. The pair of the whole network, ``ssf_scale_1``,
stands behind the final norm; in ConvNeXt on the last map, before the pooling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.method import Method
from ..methods.ssf import SSF
from .base import Place, System, UnknownKeyError, register_system

_PAIR = re.compile(r"^(?:(.+)\.)?ssf_(scale|shift)_(\d)$")
_LAYERS = {
    r"stem": ("0", "1"),
    r"patch_embed": ("proj", "norm"),
    r".*\.attn": ("qkv", "proj"),
    r".*\.mlp": ("fc1", "fc2"),
    r"stages\.\d+\.blocks\.\d+": ("conv_dw", "norm"),
    r"stages\.\d+\.downsample": ("0", "1"),
    r"layers\.\d+\.downsample": ("norm", "reduction"),
    r"(layers\.\d+\.)?blocks\.\d+": ("norm1", "norm2"),
}
"""Module -> its layers in the order of the numbers, under our names."""
_NAMES = {"proj": "0", "norm": "1"}, {"norm": "0", "proj": "1"}
"""The layers of ConvNeXt's stem and of what stands between its stages."""


@register_system("ssf")
class SSFCode(System):
    """The official ViT, Swin and ConvNeXt with a pair behind each layer."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._keys = set(model.state_dict())
        self._convnext = any(key.startswith("stages.") for key in self._keys)
        self._swin = any(key.startswith("layers.") for key in self._keys)

    def method(self, state: Mapping[str, Tensor]) -> Method:
        """SSF as published, with the pairs between the stages where the state has them."""
        between = any("downsample.ssf_" in key for key in state)
        return SSF(**{"sites": "all" if between else "official", "preset": "official", **self.options})

    def place(self, key: str) -> Place | None:
        """A pair's scale or shift, the head, or the backbone."""
        pair = _PAIR.match(key)
        if pair is not None:
            return Place("adapter", self._layer(key, pair[1] or "", int(pair[3])), pair[2])
        path, _, leaf = self._here(key).rpartition(".")
        if path in ("head", "head.fc") and leaf in ("weight", "bias"):
            return Place("head", "", leaf)
        if f"{path}.{leaf}".removeprefix(".") not in self._keys:
            raise UnknownKeyError(key)
        return Place("backbone", path, leaf)

    def _layer(self, key: str, holder: str, number: int) -> str:
        """The path of the layer that the ``number``-th pair of a module stands behind."""
        if not holder:
            if number != 1:
                raise UnknownKeyError(key)
            return self._last() if self._convnext else "norm"
        holder = self._here(holder)
        layers = next((found for pattern, found in _LAYERS.items() if re.fullmatch(pattern, holder)), ())
        if not 1 <= number <= len(layers):
            raise UnknownKeyError(key)
        return f"{holder}.{layers[number - 1]}"

    def _last(self) -> str:
        """Where ConvNeXt's last map comes from: its last block, or the norm before the pooling."""
        if "norm_pre.weight" in self._keys:
            return "norm_pre"
        found = [m for key in self._keys if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))]
        stage, block = max((int(m[1]), int(m[2])) for m in found)
        return f"stages.{stage}.blocks.{block}"

    def _here(self, path: str) -> str:
        """The path under timm's present names."""
        if self._swin:  # newer releases keep the patch merging in front of the stage behind it
            return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", path)
        if self._convnext:
            stem, between = _NAMES
            path = re.sub(r"^stem\.(proj|norm)\b", lambda m: f"stem.{stem[m[1]]}", path)
            return re.sub(r"\.downsample\.(proj|norm)\b", lambda m: f".downsample.{between[m[1]]}", path)
        return path
