"""Heads: the adapter's own classifier in place of the backbone's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import GraftError
from .layers import is_conv
from .placements import Replace

if TYPE_CHECKING:
    from .anatomy import Anatomy

HEAD_SLOT = "head"
"""The slot of an adapter's own classifier; its tensors are saved as ``head.weight`` and ``head.bias``."""


def head_placements(anatomy: Anatomy, num_classes: int) -> list[Replace]:
    """One :class:`~torchgraft.core.placements.Replace` per classifier of the model, sharing one new layer.

    The new layer is linear (a 1x1 convolution where the old one is) with weights U(-1/sqrt(d), 1/sqrt(d)) and
    zero bias, as in the official Conv-Adapter code.

    Raises:
        GraftError: The model has no classifier (a feature extractor), or its width cannot be told.
    """
    path = anatomy.head
    if path is None:
        raise GraftError(
            f"num_classes={num_classes}: {type(anatomy.model).__name__} has no classifier to replace; "
            "attach without num_classes and put a head of your own behind the model"
        )
    old = anatomy.module(path)
    shape = anatomy.shapes(path)[0]
    conv = is_conv(old) or (isinstance(old, nn.Identity) and shape is not None and len(shape) == 4)
    width = getattr(old, "in_features", None) or getattr(old, "in_channels", None)
    if width is None and shape is not None:
        width = shape[1] if conv else shape[-1]
    if not isinstance(width, int):
        raise GraftError(
            f"num_classes={num_classes}: the width of the classifier {path!r} cannot be told; give `example=`"
        )
    head = make_head(width, num_classes, conv=conv)
    return [Replace(p, head, slot=HEAD_SLOT) for p in head_paths(anatomy)]


def make_head(width: int, num_classes: int, *, conv: bool = False) -> nn.Module:
    """A fresh classifier over ``width`` features."""
    layer: Any = nn.Conv2d(width, num_classes, 1) if conv else nn.Linear(width, num_classes)
    nn.init.uniform_(layer.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))
    nn.init.zeros_(layer.bias)
    return layer


def head_paths(anatomy: Anatomy) -> list[str]:
    """Paths of the classifier and of further ones that the model averages with it (distilled transformers)."""
    if anatomy.head is None:
        return []
    found = getattr(anatomy.model, "get_classifier", lambda: None)()
    more = found if isinstance(found, (tuple, list)) else ()
    return [anatomy.head, *(p for p, m in anatomy.modules.items() if p != anatomy.head and any(m is f for f in more))]


class KeepsHead:
    """Swapped into timm models: ``reset_classifier`` replaces the backbone's classifier, never an adapter's."""

    swap_rank = 1

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """Replace the backbone's classifier and put every adapter's placements there back in."""
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
        from .adapter import activate, active, adapters, insert
        from .graft import existing_point

        model: Any = self
        for name, adapter in adapters(model).items():
            for _, placement in adapter.placements:
                home = model.get_submodule(placement.home) if placement.home else model
                point = existing_point(home)
                own = point.adapters[name] if point is not None and name in point.adapters else nn.ModuleDict()
                if placement.slot not in own:  # type: ignore[operator]
                    insert(model, name, placement)
        for parameter in model.get_submodule(_head_of(model)).parameters():
            parameter.requires_grad_(any(parameter is p for a in adapters(model).values() for p in a.parameters()))
        activate(model, active(model))


def _head_of(model: nn.Module) -> str:
    found = model.get_classifier()  # type: ignore[operator]
    found = found[0] if isinstance(found, (tuple, list)) else found
    return next((path for path, module in model.named_modules() if module is found), "")
