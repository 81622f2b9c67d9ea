"""Semantic FPN: a feature pyramid whose levels are brought to one resolution and summed.

"Panoptic Feature Pyramid Networks", arXiv:1901.02446, section 3.1; the pyramid is that of "Feature Pyramid Networks
for Object Detection", arXiv:1612.03144. For maps C_0 ... C_(m-1), high to low resolution, with strides s_i:

    L_i = lateral_i(C_i) + nearest(L_(i+1))          1x1 with bias, to the size of the finer level
    P_i = conv_i(L_i)                                3x3 with bias
    Q_i = (up2 ConvNorm3x3)^n_i (P_i)                n_i = max(1, floor(log2(s_i / s_0))); up2 only where s_i > s_0
    logits = W_seg * dropout(sum_i resize(Q_i))      all at the size of C_0; bilinear, align_corners=False

Parameters with F channels in the pyramid, D in the head, K classes and batch norm: sum of C_i F + F + 9 F^2 + F, then
9 F D + 9 D^2 (n_i - 1) + 2 D n_i a level, then D K + K.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError
from .conv_norm import ConvNorm, Norm, check_channels, check_maps, classifier, resized

__all__ = ["FeaturePyramid", "SemanticFPN", "SemanticFPNHead"]

WIDTH = 256


class FeaturePyramid(nn.Module):
    """The neck: every level gets what the coarser ones know.

    Args:
        channels: Channels of the maps, from high to low resolution.
        width: Channels of every output.

    Raises:
        GraftError: There is no map.
    """

    def __init__(self, channels: Sequence[int], width: int = WIDTH) -> None:
        super().__init__()
        self.channels = check_channels(channels)
        self.lateral_convs = nn.ModuleList(_pyramid_conv(c, width, 1) for c in self.channels)
        self.fpn_convs = nn.ModuleList(_pyramid_conv(width, width, 3) for _ in self.channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, ``channels[i]``, h_i, w_i) to (B, ``width``, h_i, w_i).

        Raises:
            GraftError: The maps are not those that the neck was built for.
        """
        check_maps(maps, self.channels)
        merged = [lateral(found) for lateral, found in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        return [conv(found) for conv, found in zip(self.fpn_convs, merged, strict=True)]


class SemanticFPNHead(nn.Module):
    """The head on a pyramid whose levels all have the same channels.

    Args:
        in_channels: Channels of every level.
        strides: Strides of the levels, not falling.
        num_classes: K.
        width: Channels of the head.
        norm: Norm of its convolutions.
        dropout: Probability with which a channel is dropped before the last convolution.

    Raises:
        GraftError: The strides fall, or the width or norm is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        *,
        width: int = WIDTH,
        norm: Norm = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not strides or strides[0] < 1 or list(strides) != sorted(strides):
            raise GraftError(f"strides={list(strides)}: expected those of the maps from high to low resolution")
        self.scale_heads = nn.ModuleList(_scale_head(in_channels, s / strides[0], width, norm) for s in strides)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(width, num_classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels (B, ``in_channels``, h_i, w_i) to logits (B, K, h_0, w_0)."""
        size = levels[0].shape[-2:]
        found = [resized(head(level), size) for head, level in zip(self.scale_heads, levels, strict=True)]
        total = found[0]
        for level in found[1:]:
            total = total + level
        return self.conv_seg(self.dropout(total))


class SemanticFPN(nn.Module):
    """Neck and head.

    Args:
        channels: Channels of the maps, from high to low resolution.
        strides: Their strides.
        num_classes: K.
        fpn_width: Channels of the pyramid.
        width: Channels of the head.
        norm: Norm of the head's convolutions; the pyramid has none.
        dropout: Probability with which a channel is dropped before the last convolution.

    Raises:
        GraftError: There is no map, the strides fall, or the width or norm is unknown.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        fpn_width: int = WIDTH,
        width: int = WIDTH,
        norm: Norm = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.neck = FeaturePyramid(channels, fpn_width)
        self.head = SemanticFPNHead(fpn_width, strides, num_classes, width=width, norm=norm, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, ``channels[i]``, h_i, w_i) to logits (B, K, h_0, w_0).

        Raises:
            GraftError: The maps are not those that the head was built for.
        """
        return self.head(self.neck(maps))


def _pyramid_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(OrderedDict(conv=conv))


def _scale_head(in_channels: int, ratio: float, width: int, norm: Norm) -> nn.Sequential:
    parts: list[nn.Module] = []
    for i in range(max(1, int(math.log2(ratio)))):
        parts.append(ConvNorm(in_channels if i == 0 else width, width, 3, norm))
        if ratio > 1:
            parts.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*parts)
