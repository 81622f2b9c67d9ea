"""Heads of semantic segmentation by name: maps of a backbone in, a map of logits at the finest resolution out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import GraftError, nearest
from .conv_norm import Norm
from .fcn import FCN, Linear
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet

__all__ = ["HEADS", "segmentation_head"]

HEADS = ("linear", "fcn", "semantic-fpn", "upernet")


def segmentation_head(
    name: str,
    channels: Sequence[int],
    strides: Sequence[int],
    num_classes: int,
    *,
    width: int | None = None,
    norm: Norm = "batch",
    dropout: float = 0.1,
) -> nn.Module:
    """Build a head that takes the list of maps (B, ``channels[i]``, h_i, w_i), high to low resolution.

    The sizes of the maps need not halve exactly. The head returns logits (B, ``num_classes``, h_0, w_0).

    Args:
        name: ``"linear"`` (a 1x1 convolution of all maps, resized to the finest), ``"fcn"`` (one 3x3 convolution on the
            map of stride 16), ``"semantic-fpn"`` or ``"upernet"``.
        channels: Channels of the maps, one map or more.
        strides: Their strides, not falling.
        num_classes: Classes K, the background included where it is one.
        width: Channels of the head; default: 256, of UPerNet 512. ``linear`` has none.
        norm: ``"batch"``, or ``"group"`` for small batches: UPerNet's batch norm cannot train on a single image.
            ``linear`` has no norm.
        dropout: Probability with which a channel is dropped before the last convolution.

    Raises:
        GraftError: One of the values is not as described.
    """
    if name not in HEADS:
        raise GraftError(f"unknown segmentation head {name!r}; {nearest(name, HEADS)}")
    if not channels or len(channels) != len(strides) or min(strides) < 1 or list(strides) != sorted(strides):
        raise GraftError(
            f"{name}: channels={list(channels)}, strides={list(strides)}: expected one of each per map, of one map or "
            "more, from high to low resolution"
        )
    if num_classes < 1:
        raise GraftError(f"{name}: num_classes={num_classes}: expected at least 1")
    if not 0 <= dropout < 1:
        raise GraftError(f"{name}: dropout={dropout}: expected a probability from 0 to below 1")
    if norm not in ("batch", "group"):
        raise GraftError(f"{name}: norm={norm!r}: expected 'batch' or 'group'")
    if name == "linear":
        if width is not None:
            raise GraftError(f"linear: width={width}: this head has no width; leave it out or use 'fcn'")
        return Linear(channels, num_classes, dropout=dropout)
    options: dict[str, Any] = {"norm": norm, "dropout": dropout}
    if width is not None:
        options["width"] = width
    if name == "fcn":
        return FCN(channels, strides, num_classes, **options)
    if name == "upernet":
        return UPerNet(channels, num_classes, **options)
    if width is not None:
        options["fpn_width"] = width
    return SemanticFPN(channels, strides, num_classes, **options)
