"""Convpass's official code (JieShibo/PETL-ViT, commit 026e4f1), on the ViTs and Swins of timm 0.4.12.

A checkpoint holds adapters and head, ``BLOCK.adapter_{attn,mlp}.adapter_{down,conv,up}``. The factor s stands in the
configuration of each task and not in the checkpoint, so ``scale`` must be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.method import Method
from ..errors import GraftError
from ..methods.convpass import Convpass
from .base import Place, System, UnknownKeyError, register_system

_ADAPTER = re.compile(r"^(.+)\.adapter_(attn|mlp)\.adapter_((?:down|conv|up)\.(?:weight|bias))$")
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")


@register_system("convpass")
class ConvpassCode(System):
    """The official ViT and Swin, with bypasses beside attention, the MLP or both."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._keys = set(model.state_dict())
        self._swin = any(_DOWNSAMPLE.match(key) for key in self._keys)

    def method(self, state: Mapping[str, Tensor]) -> Method:
        """Convpass with the width, kernel and sites of the state, and the scale of the options."""
        found = [(match[2], tensor) for key, tensor in state.items() if (match := _ADAPTER.match(key))]
        conv = next((t for _, t in found if t.dim() == 4), None)
        if conv is None:
            raise GraftError("convpass: the state holds no 'adapter_conv.weight'; expected an adapted network")
        if "scale" not in self.options:
            raise GraftError("convpass: the checkpoint does not hold its scale; give that of its task, such as scale=1")
        kinds = {kind for kind, _ in found}
        sites = tuple(site for site in ("attn", "mlp") if site in kinds)
        return Convpass(**{"width": conv.shape[0], "kernel": conv.shape[-1], "sites": sites, **self.options})

    def place(self, key: str) -> Place | None:
        """A bypass of a block, the head, or the backbone under its own name."""
        adapter = _ADAPTER.match(key)
        if adapter is not None:
            return Place("adapter", adapter[1], adapter[3], slot=adapter[2])
        if key in ("head.weight", "head.bias"):
            return Place("head", "", key.removeprefix("head."))
        if self._swin:
            # Newer releases of timm keep the patch merging in front of the stage behind it.
            key = _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample.", key)
        if key not in self._keys:
            raise UnknownKeyError(key)
        path, _, leaf = key.rpartition(".")
        return Place("backbone", path, leaf)
