"""DenseCLIP for semantic segmentation: a decoder that has read class scores, and two losses.

    logits = head([c2 .. c5 with scores])                                     (B, K, h, w)
    loss   = CE(up(logits), y) + 0.4 CE(up(s / tau), y)                       at the size of the labels

Source: "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", arXiv 2112.01518.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError
from ..dense.pixel_loss import IGNORE_INDEX, pixel_cross_entropy
from ..heads import SemanticFPN
from .prompting import Guided, LanguageGuided

Denominator = Literal["valid", "all_pixels"]

MakeHead = Callable[[tuple[int, ...], tuple[int, ...], int], nn.Module]
"""From the channels and strides of the maps and the number of classes to a module: list of maps -> logits."""


class DenseClipSegmentor(LanguageGuided):
    """Images to class logits of every pixel.

    Args:
        *args: Those of :class:`LanguageGuided`.
        make_head: Builds the decoder for the maps, those with the scores included; published: Semantic FPN.
        score_loss_weight: Weight of the auxiliary loss.
        ignore_index: Label of the pixels that do not count.
        denominator: Average the losses over the labelled pixels, or over all, as the published code does.
        **kwargs: Those of :class:`LanguageGuided`.

    Raises:
        GraftError: The denominator is unknown.
    """

    def __init__(
        self,
        *args: Any,
        make_head: MakeHead = SemanticFPN,
        score_loss_weight: float = 0.4,
        ignore_index: int = IGNORE_INDEX,
        denominator: Denominator = "valid",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if denominator not in get_args(Denominator):
            raise GraftError(f"denominator={denominator!r}: expected one of {', '.join(get_args(Denominator))}")
        self.score_loss_weight, self.ignore_index, self.denominator = score_loss_weight, ignore_index, denominator
        self.decode_head = make_head(self.in_channels, tuple(self.backbone.strides), self.num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K, H, W)."""
        logits, _ = self.segment(image)
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)

    def segment(self, image: Tensor) -> tuple[Tensor, Guided]:
        """Images (B, 3, H, W) to logits at the head's resolution (B, K, h, w), and what guided them."""
        guided = self.guide(image)
        return self.decode_head(guided.maps), guided

    def losses(self, logits: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weighted losses of what :meth:`segment` returned.

        Args:
            logits: (B, K, h, w).
            scores: Cosines (B, K, h', w').
            labels: Classes (B, H, W), int64.

        Returns:
            ``loss_segmentation`` and ``loss_score``, scalars to be added.
        """
        return {
            "loss_segmentation": self._cross_entropy(logits, labels),
            "loss_score": self.score_loss_weight * self._cross_entropy(scores / self.tau, labels),
        }

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        mean = pixel_cross_entropy(logits, labels, ignore_index=self.ignore_index)
        if self.denominator == "valid":
            return mean
        return mean * (labels != self.ignore_index).sum() / labels.numel()
