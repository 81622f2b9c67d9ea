"""DenseCLIP for detection: a feature pyramid that has read class scores, and the loss that teaches them.

    levels = FPN(c3, c4, [c5 ; s / tau])             and two more: P6 = conv(c5 with scores), P7 = conv(P6), stride 2
    loss   = box_cross_entropy(up(s / tau), boxes)   on the stride-4 grid, weight 1

Any torchvision detector takes the levels as its backbone's. Source: "DenseCLIP: Language-Guided Dense Prediction with
Context-Aware Prompting", arXiv 2112.01518.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from ...errors import GraftError
from ..dense.box_loss import box_cross_entropy
from .prompting import LanguageGuided


class ExtraLevels(ExtraFPNBlock):
    """Coarser levels by 3x3 convolutions of stride 2, the first on the last input, without activation between them.

    Torchvision's ``LastLevelP6P7`` puts a ReLU before the second, which the published RetinaNet has not.

    Args:
        in_channels: Channels of the last input of the pyramid.
        out_channels: Channels of the levels.
        count: How many levels.
    """

    def __init__(self, in_channels: int, out_channels: int, count: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(out_channels if i else in_channels, out_channels, 3, stride=2, padding=1) for i in range(count)
        )

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Levels ``p``, inputs ``c`` and the names to levels and names with the coarser ones behind."""
        x = c[-1]
        for conv in self.convs:
            x = conv(x)
            p.append(x)
            names.append(str(len(names)))
        return p, names


def xavier_uniform(module: nn.Module) -> None:
    """Start every convolution inside from Xavier's uniform distribution and zero biases, as mmdetection does."""
    for inner in module.modules():
        if isinstance(inner, nn.Conv2d):
            nn.init.xavier_uniform_(inner.weight)
            if inner.bias is not None:
                nn.init.zeros_(inner.bias)


class DenseClipDetectorBackbone(LanguageGuided):
    """Backbone of a detector: images in, pyramid levels out.

    Args:
        *args: Those of :class:`LanguageGuided`.
        fpn_channels: Channels of the levels.
        start_level: First map that enters the pyramid; 1 for RetinaNet, 0 for Mask R-CNN.
        extra_levels: Coarser levels behind it.
        concat_scaled: Divide the scores by ``tau`` before they are concatenated, as published for detection.
        **kwargs: Those of :class:`LanguageGuided`.

    Raises:
        GraftError: The start level leaves out the map that holds the scores.

    Attributes:
        out_channels: Channels of every level.
    """

    def __init__(
        self,
        *args: Any,
        fpn_channels: int = 256,
        start_level: int = 1,
        extra_levels: int = 2,
        concat_scaled: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, concat_scaled=concat_scaled, **kwargs)
        if not 0 <= start_level <= self.backbone.dense_index:
            raise GraftError(
                f"start_level={start_level}: the scores are on map {self.backbone.dense_index}; start there or before"
            )
        self.out_channels, self.start_level = fpn_channels, start_level
        entering = list(self.in_channels[start_level:])
        extra = ExtraLevels(entering[-1], fpn_channels, extra_levels) if extra_levels else None
        self.neck = FeaturePyramidNetwork(entering, fpn_channels, extra)
        xavier_uniform(self.neck)

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, H, W) to levels (B, ``out_channels``, ., .), from high to low resolution."""
        return self.detect(image)[0]

    def detect(self, image: Tensor) -> tuple[OrderedDict[str, Tensor], Tensor]:
        """Images (B, 3, H, W) to levels and the scaled scores (B, K, H/4, W/4) on the grid of the first map."""
        guided = self.guide(image)
        entering = guided.maps[self.start_level :]
        levels = self.neck(OrderedDict((str(i), found) for i, found in enumerate(entering)))
        grid = guided.maps[0].shape[-2:]
        return levels, F.interpolate(guided.scores / self.tau, grid, mode="bilinear", align_corners=False)

    def score_loss(self, scores: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Auxiliary loss of the scores of :meth:`detect`.

        Args:
            scores: (B, K, H/4, W/4), scaled.
            boxes: Per image (n, 4): x1, y1, x2, y2 in pixels of the images that were given.
            labels: Per image (n,): classes from 0.

        Returns:
            A scalar, zero for a batch without boxes.
        """
        return box_cross_entropy(scores, boxes, labels, stride=self.backbone.strides[0])
