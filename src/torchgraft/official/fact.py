"""FacT's official code (JieShibo/PETL-ViT, commit 026e4f1), on the ViTs of timm 0.4.12.

A checkpoint holds factors and head: ``FacTu``, ``FacTv``, and ``BLOCK.attn.q_FacTs`` and kin (tensor train) or
``FacTc``, ``FacTp`` (Tucker). The factor s stands in the configuration of each task and not in the checkpoint, so
``scale`` must be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.method import Method
from ..errors import GraftError
from ..methods.fact import FacTTK, FacTTT
from .base import Place, System, UnknownKeyError, register_system

_SHARED = {"FacTu.weight": "u", "FacTv.weight": "v", "FacTc": "c", "FacTp": "p"}
_INNER = re.compile(r"^(blocks\.\d+\.(?:attn|mlp))\.(q|k|v|proj|fc1|fc2)_FacTs\.weight$")


@register_system("fact")
class FacTCode(System):
    """The official ViT with its shared factors, in tensor-train or Tucker form."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._keys = set(model.state_dict())

    def method(self, state: Mapping[str, Tensor]) -> Method:
        """FacT with the rank and form of the state, and the scale of the options."""
        if "FacTu.weight" not in state:
            raise GraftError("fact: the state holds no 'FacTu.weight'; expected the factors of an adapted ViT")
        if "scale" not in self.options:
            raise GraftError("fact: the checkpoint does not hold its scale; give that of its task, such as scale=10")
        cls = FacTTK if "FacTc" in state else FacTTT
        return cls(**{"rank": state["FacTu.weight"].shape[0], **self.options})

    def place(self, key: str) -> Place | None:
        """A shared factor, the inner factor of a layer, the head, or the backbone under its own name."""
        if key in _SHARED:
            return Place("adapter", "", _SHARED[key])
        inner = _INNER.match(key)
        if inner is not None:
            if inner[2] in ("q", "k", "v"):
                return Place("adapter", f"{inner[1]}.qkv", "s", part=("qkv".index(inner[2]), 3))
            return Place("adapter", f"{inner[1]}.{inner[2]}", "s")
        if key in ("head.weight", "head.bias"):
            return Place("head", "", key.removeprefix("head."))
        if key not in self._keys:
            raise UnknownKeyError(key)
        path, _, name = key.rpartition(".")
        return Place("backbone", path, name)
