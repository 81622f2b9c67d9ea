"""What the segmentation heads are made of: a convolution with norm and ReLU, resizing, the last convolution.

    ConvNorm:   y = ReLU(norm(W * x)),    x (B, C_in, h, w), y (B, C_out, h, w), W without bias, odd kernel

The parts are called ``conv``, and ``bn`` or ``gn`` after the norm, which are the names in published checkpoints.
Initialisation: He normal by the fan out; the last convolution of a head normal with deviation 0.01, bias 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError

__all__ = ["ConvNorm", "Norm", "check_channels", "check_maps", "classifier", "resized"]

Norm = Literal["batch", "group"]

_GROUPS, _CHANNELS_PER_GROUP = 32, 4
"""At most so many groups, at least so many channels in one: a group of one channel on a 1x1 map is always zero."""


class ConvNorm(nn.Sequential):
    """Convolution, norm, ReLU.

    Args:
        in_channels: C_in.
        out_channels: C_out, at least 2.
        kernel: Odd size of the kernel; the size of the map is kept.
        norm: ``"batch"`` or ``"group"``: at most 32 groups, of 4 channels and more where the width allows it.

    Raises:
        GraftError: The width or the norm is not one of these.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm: Norm = "batch") -> None:
        if out_channels < 2:
            raise GraftError(f"width={out_channels}: expected at least 2 channels")
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        parts: list[tuple[str, nn.Module]] = [("conv", conv)]
        if norm == "batch":
            parts.append(("bn", nn.BatchNorm2d(out_channels)))
        elif norm == "group":
            parts.append(("gn", nn.GroupNorm(_num_groups(out_channels), out_channels)))
        else:
            raise GraftError(f"norm={norm!r}: expected 'batch' or 'group'")
        super().__init__(OrderedDict([*parts, ("relu", nn.ReLU(inplace=True))]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) to (B, C_out, h, w).

        Raises:
            GraftError: BatchNorm would train on a single value per channel.
        """
        norm = self[1]
        if isinstance(norm, nn.BatchNorm2d) and norm.training and len(x) * x.shape[-2] * x.shape[-1] == 1:
            raise GraftError(
                "BatchNorm of a segmentation head cannot train on one image whose map is 1x1 (one value per channel): "
                'use norm="group" or at least 2 images a batch'
            )
        return super().forward(x)


def classifier(width: int, num_classes: int) -> nn.Conv2d:
    """The last convolution: 1x1, ``width`` to ``num_classes`` channels."""
    conv = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) at ``size`` (H, W), bilinear with ``align_corners=False``."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def check_channels(channels: Sequence[int]) -> tuple[int, ...]:
    """The channels of the maps, of which there must be one at least.

    Raises:
        GraftError: There is no map, or one has no channels.
    """
    if not channels or min(channels) < 1:
        raise GraftError(f"channels={list(channels)}: expected the channels of one map or more, high to low resolution")
    return tuple(channels)


def check_maps(maps: Sequence[Tensor], channels: Sequence[int]) -> None:
    """Whether maps are those that a head was built for.

    Raises:
        GraftError: Their number, channels or dimensions are others.
    """
    found = [tuple(x.shape) for x in maps]
    if len(found) != len(channels) or any(
        len(shape) != 4 or shape[1] != c for shape, c in zip(found, channels, strict=True)
    ):
        raise GraftError(
            f"maps of shapes {found}: this head expects {len(channels)}, (B, C, h, w) with C = {list(channels)}, "
            "from high to low resolution"
        )


def _num_groups(width: int) -> int:
    most = max(1, min(_GROUPS, width // _CHANNELS_PER_GROUP))
    return next(groups for groups in range(most, 0, -1) if width % groups == 0)
