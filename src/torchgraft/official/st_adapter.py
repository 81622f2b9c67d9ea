"""ST-Adapter's official code (linziyi96/st-adapter, commit b914b38), on CLIP's ViTs.

The host is a timm ViT with a norm in front of its blocks (``vit_base_patch16_clip_quickgelu_224``). The official head
averages the class tokens of the frames in front of the final norm: run the model through
``VideoWrapper(model, average="norm")``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.method import Method
from ..errors import GraftError
from ..methods.st_adapter import STAdapter
from .base import Place, System, UnknownKeyError, register_system

_BLOCK = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$")
_ADAPTER = re.compile(r"^adapter_(pre_attn|pre_mlp)\.((?:fc1|conv|fc2)\.(?:weight|bias))$")
_OUTSIDE = {
    "class_embedding": ("", "cls_token"),
    "positional_embedding": ("", "pos_embed"),
    "conv1.weight": ("patch_embed.proj", "weight"),
    "ln_pre.weight": ("norm_pre", "weight"),
    "ln_pre.bias": ("norm_pre", "bias"),
    "ln_post.weight": ("norm", "weight"),
    "ln_post.bias": ("norm", "bias"),
}
_INSIDE = {
    "ln_1.weight": ("norm1", "weight"),
    "ln_1.bias": ("norm1", "bias"),
    "ln_2.weight": ("norm2", "weight"),
    "ln_2.bias": ("norm2", "bias"),
    "attn.in_proj_weight": ("attn.qkv", "weight"),
    "attn.in_proj_bias": ("attn.qkv", "bias"),
    "attn.out_proj.weight": ("attn.proj", "weight"),
    "attn.out_proj.bias": ("attn.proj", "bias"),
    "mlp.c_fc.weight": ("mlp.fc1", "weight"),
    "mlp.c_fc.bias": ("mlp.fc1", "bias"),
    "mlp.c_proj.weight": ("mlp.fc2", "weight"),
    "mlp.c_proj.bias": ("mlp.fc2", "bias"),
}


@register_system("st_adapter")
class STAdapterCode(System):
    """The official video network, and its checkpoints, which hold only adapters and head."""

    def method(self, state: Mapping[str, Tensor]) -> Method:
        """Width, kernel, places and number of blocks as the shapes and names say; ``frames`` from the options."""
        inside = [(int(block[1]), block[2]) for key in state if (block := _BLOCK.match(key))]
        found = [(number, inner) for number, name in inside if (inner := _ADAPTER.match(name))]
        if not found:
            raise GraftError("st_adapter: the state holds no 'adapter_pre_attn' and no 'adapter_pre_mlp'")
        blocks = {number for number, _ in found}
        number, first = found[0]
        name = f"transformer.resblocks.{number}.adapter_{first[1]}.conv.weight"
        if name not in state:
            raise GraftError(f"st_adapter: the state holds nothing for {name!r}")
        width, _, *kernel = state[name].shape
        depth = self._depth()
        if blocks != set(range(depth - len(blocks), depth)):
            raise GraftError(
                f"st_adapter: the checkpoint adapts the blocks {sorted(blocks)}, which are not the last ones of this "
                f"model's {depth}; create the model that it was trained on"
            )
        values: dict[str, Any] = {
            "width": width,
            "kernel": tuple(kernel),
            "pre_attn": any(inner[1] == "pre_attn" for _, inner in found),
            "pre_mlp": any(inner[1] == "pre_mlp" for _, inner in found),
            "last": None if len(blocks) == depth else len(blocks),
        }
        return STAdapter(**{**values, **self.options})

    def place(self, key: str) -> Place | None:
        """Block by block; q, k and v are stacked there as in timm."""
        if key in ("fc.weight", "fc.bias"):
            return Place("head", "", key.removeprefix("fc."))
        if key in _OUTSIDE:
            return Place("backbone", *_OUTSIDE[key])
        block = _BLOCK.match(key)
        if block is None:
            raise UnknownKeyError(key)
        path = f"blocks.{block[1]}"
        if block[2] in _INSIDE:
            inner, name = _INSIDE[block[2]]
            return Place("backbone", f"{path}.{inner}", name)
        adapter = _ADAPTER.match(block[2])
        if adapter is None:
            raise UnknownKeyError(key)
        return Place("adapter", path, adapter[2], slot=adapter[1])

    def _depth(self) -> int:
        blocks = getattr(self.model, "blocks", None)
        if not isinstance(blocks, nn.Module) or not hasattr(self.model, "norm_pre"):
            raise GraftError(
                f"st_adapter: {type(self.model).__name__} is no timm ViT; expected CLIP's, such as "
                "vit_base_patch16_clip_quickgelu_224"
            )
        return len(list(blocks.children()))
