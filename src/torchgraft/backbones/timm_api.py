"""What our architectures use of timm beyond its public names, and how they are made known to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import is_model, model_entrypoint, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import nn

__all__ = [
    "ARCHITECTURES",
    "WRAPPERS",
    "FeatureGetterNet",
    "feature_take_indices",
    "register_architectures",
    "register_backbone",
    "tap_infos",
    "untrained_cfg",
    "unwrapped",
]

ARCHITECTURES: tuple[str, ...] = ("ghost_regnet", "hatnet", "hornet", "internimage", "revcol")
"""The modules of this package that define backbones timm lacks."""

WRAPPERS = ("state_dict", "model", "model_ema", "state_dict_ema", "module")
"""Keys under which published checkpoints hold their state dict."""
_PREFIX, _BACKBONE = "module.", "backbone."

F = TypeVar("F", bound=Callable[..., nn.Module])


def register_backbone(build: F) -> F:
    """Decorator that registers a function in timm under its name, unless timm or another package has that name.

    Like ``timm.models.register_model`` otherwise: the module's ``default_cfgs`` must stand above the function.
    """
    name = build.__name__
    taken = is_model(name) and model_entrypoint(name).__module__ != build.__module__
    if not taken:
        register_model(build)
    return build


def untrained_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """What timm knows about a model whose weights it does not have.

    Args:
        side: Side of the images that it was made for, in pixels.
        **kwargs: More fields, or other values of these.
    """
    fields = {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
    }
    return {**fields, **kwargs}


def register_architectures() -> None:
    """Import every module of :data:`ARCHITECTURES`, which registers its models in timm."""
    for name in ARCHITECTURES:
        importlib.import_module(f".{name}", __package__)


def tap_infos(model: nn.Module) -> list[dict[str, Any]]:
    """Channels, stride and name of every map of a timm model, in forward order; empty where it names none."""
    info: Any = getattr(model, "feature_info", [])
    return getattr(info, "info", info)


def unwrapped(checkpoint: dict) -> dict:
    """The state dict inside a checkpoint: out of its wrapper, without the prefixes of wrapping modules.

    Of a detector or segmentor (``backbone.``, ``neck.``, ``decode_head.``) that is the backbone alone.

    Args:
        checkpoint: What an official file holds: a state dict, or one under ``model``, ``state_dict``, ``model_ema``,
            ``state_dict_ema`` or ``module``. It is not changed.
    """
    state = checkpoint
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    of_backbone = {k.removeprefix(_BACKBONE): v for k, v in state.items() if k.startswith(_BACKBONE)}
    return of_backbone or state
