"""Builder of the system ``st_adapter``: our method on a small CLIP ViT, which sees clips through our wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from timm.layers import get_act_layer
from timm.models import VisionTransformer
from torch import Tensor, nn

from torchgraft.core.frames import VideoWrapper
from torchgraft.methods.st_adapter import STAdapter
from torchgraft.official.st_adapter import STAdapterCode

from ..adapted import AdaptedNetwork
from ..case import Config, GoldenCase, Tensors
from ..files import CaseError

ACTS = {"quick_gelu": "quick_gelu"}


def clip_vit(config: Config, mode: str) -> GoldenCase:
    host = _host(config)
    layers = config["layers"]
    method = STAdapter(
        width=config["adapter_width"],
        kernel=tuple(config["adapter_kernel_size"]),
        pre_attn=config["adapter_pre_attn"],
        pre_mlp=config["adapter_pre_mlp"],
        last=config["adapter_layers"],
    )
    return ClipsNetwork(
        host,
        STAdapterCode(host),
        frames=config["frames"],
        num_classes=config["num_classes"],
        mode=mode,
        method=method,
        blocks={f"block{i}": f"blocks.{i}" for i in range(layers)},
    )


FORMS = {"clip_vit": clip_vit}


class ClipsNetwork(AdaptedNetwork):
    """Clips in: the frames' class tokens are averaged in front of the final norm, as published."""

    def __init__(self, backbone: nn.Module, system: STAdapterCode, *, frames: int, **options: object) -> None:
        super().__init__(backbone, system, **options)  # type: ignore[arg-type]
        self._clips = VideoWrapper(self._model, frames, average="norm")

    def run(self, inputs: Tensors) -> Tensors:
        outputs = super().run(inputs)
        return {name: tensor for name, tensor in outputs.items() if name != "features"}

    def _forward(self, inputs: Tensors) -> Tensor:
        return self._clips(inputs["video"])


def _host(config: Config) -> VisionTransformer:
    """CLIP's image tower: a norm in front of the blocks, no bias in the patch embedding."""
    return VisionTransformer(
        img_size=config["input_resolution"],
        patch_size=config["patch_size"],
        embed_dim=config["width"],
        depth=config["layers"],
        num_heads=config["heads"],
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
        act_layer=get_act_layer(_known("act", config["act"], ACTS)),
        num_classes=0,
    )


def _known(key: str, value: str, options: Mapping[str, str]) -> str:
    if value not in options:
        raise CaseError(f"unknown {key} {value!r}, expected one of {sorted(options)}")
    return options[value]
