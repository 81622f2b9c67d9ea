"""What a backbone says about itself: where its weights came from and what input they expect."""

from __future__ import annotations

from typing import Any

from torch import nn


def note_origin(model: nn.Module, origin: str, **config: Any) -> nn.Module:
    """Note on ``model`` where its weights came from.

    Args:
        model: Any backbone.
        origin: Becomes ``model.torchgraft_weights``.
        **config: Updates ``model.pretrained_cfg``, the fields that timm's models have. Weights that timm kept
            in there are removed, so that it holds plain values only.

    Returns:
        ``model``.
    """
    merged = {**data_config_of(model), **config}
    merged.pop("state_dict", None)
    vars(model).update(torchgraft_weights=origin, pretrained_cfg=merged, default_cfg=merged)
    return model


def origin_of(model: nn.Module) -> str | None:
    """What :func:`note_origin` noted, or None for a model that was built elsewhere."""
    return vars(model).get("torchgraft_weights")


def data_config_of(model: nn.Module) -> dict[str, Any]:
    """A copy of the model's ``pretrained_cfg``, empty when it has none."""
    return dict(vars(model).get("pretrained_cfg") or {})
