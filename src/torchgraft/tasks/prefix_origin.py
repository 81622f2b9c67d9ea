"""What kept activations were computed from: all that must be the same for a file of them to be used again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from ..core.blocks import inner_modules
from ..core.cut import Cut
from ..core.fingerprint import architecture
from ..data import ImageDataset, Transforms
from ..data.activations import read_origin
from ..swap import original_class
from ..version import VERSION

_WORDS = {
    "images": "the images or their labels",
    "image_size": "the image size",
    "transform": "the transform",
    "network": "the backbone",
    "weights": "the backbone's weights",
    "cut": "the first trained site",
    "dtype": "the type",
    "arithmetic": "the arithmetic",
    "versions": "the version of torchgraft, torch, torchvision or timm",
}
"""The parts of an origin in words, in the order in which the first difference is told."""


def origin_of(
    model: nn.Module, cut: Cut, transforms: Transforms, arithmetic: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The origin of what goes through ``cut``, but for the images.

    Args:
        model: The adapted backbone. What adapters own does not count: in front of the cut they do nothing.
        cut: The cut.
        transforms: Transforms of the images.
        arithmetic: Device, precision and layout.
        dtype: Type in which the values are kept.
    """
    network, weights = hashlib.sha256(architecture(model).encode()), hashlib.sha256()
    for path, module in (("", model), *inner_modules(model)):
        network.update(f"{path} {original_class(module).__qualname__} {module.extra_repr()}\n".encode())
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                weights.update(f"{path}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = dict(transforms.config)
    return _plain(
        {
            "versions": {
                "torchgraft": VERSION,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "timm": timm.__version__,
            },
            "network": network.hexdigest(),
            "weights": weights.hexdigest(),
            "image_size": config.pop("input_size"),
            "transform": {**config, "steps": repr(transforms.eval)},
            "cut": {"at": str(cut), "shape": cut.shape, "order": cut.order, "dtype": str(cut.dtype)},
            "dtype": str(dtype),
            "arithmetic": arithmetic,
        }
    )


def with_images(origin: dict[str, Any], images: ImageDataset) -> dict[str, Any]:
    """The origin of a file: that of the values, and the images with their labels."""
    return {**origin, "images": {"count": len(images), "sha256": images.fingerprint()}}


def name_of(origin: dict[str, Any]) -> str:
    """A name that no other origin has."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]


def what_changed(files: list[Path], origin: dict[str, Any]) -> str | None:
    """Why none of the files can be used, by the one that is most like what is asked for; None without files."""
    found = [other for path in files if (other := read_origin(path)) is not None]
    differences = [[k for k in _WORDS if other.get(k) != origin[k]] for other in found]
    fewest = min(differences, key=len, default=[])
    return _WORDS[fewest[0]] if fewest else None


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it is when it is read from a file again."""
    return json.loads(json.dumps(value))
