"""Heads without a pyramid: a linear classifier of every point, and one convolution more.

    linear:   logits = b + sum_i up(W_i * dropout(C_i))                  1x1; C_i (B, C_i, h_i, w_i)
    fcn:      logits = up(W_seg * dropout(ConvNorm3x3(C_j)))             one map j, the one of stride 16

``up`` is bilinear with align_corners=False, to the size of the finest map. As resizing and a 1x1 convolution commute,
``linear`` is exactly one 1x1 convolution of all maps, resized to the finest and concatenated; only K channels need to
be resized. It reads all maps, because the last alone, at stride 32, cannot say where anything is, which says more about
its stride than about the features that a linear head is there to judge.

fcn: "Fully Convolutional Networks for Semantic Segmentation", arXiv:1411.4038, in the form that "Pyramid Scene Parsing
Network", arXiv:1612.01105, section 3.3, trains beside the main head with the loss weight 0.4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from ...errors import GraftError
from .conv_norm import ConvNorm, Norm, check_channels, check_maps, classifier, resized

__all__ = ["FCN", "Auxiliary", "Linear"]

WIDTH, STRIDE = 256, 16


class Linear(nn.Module):
    """A linear classifier of the points of all maps.

    Args:
        channels: Channels of the maps, from high to low resolution.
        num_classes: K.
        dropout: Probability with which a channel of a map is dropped.

    Raises:
        GraftError: There is no map.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.channels = check_channels(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifiers = nn.ModuleList(nn.Conv2d(c, num_classes, 1, bias=i == 0) for i, c in enumerate(self.channels))
        for conv in self.classifiers:
            nn.init.normal_(conv.weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(self.classifiers[0].bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, ``channels[i]``, h_i, w_i) to logits (B, K, h_0, w_0).

        Raises:
            GraftError: The maps are not those that the head was built for.
        """
        check_maps(maps, self.channels)
        first, *others = (conv(self.dropout(found)) for conv, found in zip(self.classifiers, maps, strict=True))
        for logits in others:
            first = first + resized(logits, first.shape[-2:])
        return first


class FCN(nn.Module):
    """One convolution and a classifier on one of the maps.

    Args:
        channels: Channels of the maps, from high to low resolution.
        strides: Their strides.
        num_classes: K.
        width: Channels of the convolution.
        stride: Which map: the last whose stride is not above this, the first if all are.
        to_finest: Whether the logits are resized to the finest map; else they have the size of their own.
        norm: Norm of the convolution.
        dropout: Probability with which a channel is dropped before the classifier.

    Attributes:
        level: The index of the map.

    Raises:
        GraftError: There is no map, or the width or norm is unknown.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        width: int = WIDTH,
        stride: int = STRIDE,
        to_finest: bool = True,
        norm: Norm = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels = check_channels(channels)
        if len(strides) != len(channels):
            raise GraftError(f"{len(channels)} maps and the strides {list(strides)}: expected one stride per map")
        self.level = max((i for i, s in enumerate(strides) if s <= stride), default=0)
        self.to_finest = to_finest
        self.convs = nn.Sequential(ConvNorm(self.channels[self.level], width, 3, norm))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, ``channels[i]``, h_i, w_i) to logits (B, K, h_0, w_0), or of the size of its own map.

        Raises:
            GraftError: The maps are not those that the head was built for, or batch norm would train on one value.
        """
        check_maps(maps, self.channels)
        logits = self.conv_seg(self.dropout(self.convs(maps[self.level])))
        return resized(logits, maps[0].shape[-2:]) if self.to_finest else logits


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """A second head that is there for training only: an FCN on a map inside the backbone.

    Attributes:
        stride: Stride of the map, as for :class:`FCN`.
        width: Channels of the convolution.
        norm: Its norm.
        dropout: Probability with which a channel is dropped.
        loss_weight: What its loss is multiplied by.
    """

    stride: int = STRIDE
    width: int = WIDTH
    norm: Norm = "batch"
    dropout: float = 0.1
    loss_weight: float = 0.4

    def build(self, channels: Sequence[int], strides: Sequence[int], num_classes: int) -> FCN:
        """The head; its logits have the size of its own map, so that they are resized to the labels only once.

        Raises:
            GraftError: As for :class:`FCN`.
        """
        return FCN(
            channels,
            strides,
            num_classes,
            width=self.width,
            stride=self.stride,
            to_finest=False,
            norm=self.norm,
            dropout=self.dropout,
        )
