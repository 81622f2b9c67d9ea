"""Scores of semantic segmentation from one confusion matrix over all pixels of a data set.

With n_kj the pixels of class k that were called j, t_k = sum_j n_kj and p_k = sum_j n_jk,

    IoU_k = n_kk / (t_k + p_k - n_kk),   Acc_k = n_kk / t_k,   aAcc = sum_k n_kk / sum_k t_k

and mIoU and mAcc are the means over classes, as in "Fully Convolutional Networks for Semantic Segmentation",
arXiv:1411.4038, section 5. A class that is neither in the labels nor in the predictions has no IoU (NaN), one that is
not in the labels no accuracy; they are left out of the means.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from ...data.segmentation import IGNORE_INDEX
from ...errors import GraftError

__all__ = ["SegmentationReport", "SegmentationScores"]


class SegmentationReport(NamedTuple):
    """Scores, all in float64 and from 0 to 1; NaN where there is nothing to score.

    Attributes:
        mean_iou: mIoU.
        mean_accuracy: mAcc.
        pixel_accuracy: aAcc.
        iou: (K,).
        accuracy: (K,).
        confusion: (K, K), int64, in pixels; row: label, column: prediction.
    """

    mean_iou: Tensor
    mean_accuracy: Tensor
    pixel_accuracy: Tensor
    iou: Tensor
    accuracy: Tensor
    confusion: Tensor


class SegmentationScores(Metric):
    """Running confusion matrix; on several devices it adds up to that of all images.

    Args:
        num_classes: K, at least 2.
        ignore_index: Label of the pixels that do not count.

    Attributes:
        confusion: (K, K), int64, so that no pixel is lost to rounding however many there are.

    Raises:
        GraftError: There are fewer than 2 classes.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    confusion: Tensor

    def __init__(self, num_classes: int, *, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        if num_classes < 2:
            raise GraftError(f"num_classes={num_classes}: expected at least 2, the background counted as one")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            predictions: Logits (B, K, H, W), or class numbers (B, H, W).
            labels: Class numbers (B, H, W) in 0 ... K-1, or ``ignore_index``.

        Raises:
            GraftError: The shapes do not belong together, or a number is no class; nothing was added then.
        """
        if predictions.dim() == labels.dim() + 1 and predictions.shape[1] == self.num_classes:
            predictions = predictions.argmax(1)
        if predictions.shape != labels.shape:
            raise GraftError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)}: expected logits "
                f"(B, {self.num_classes}, H, W) or class numbers (B, H, W), and labels (B, H, W)"
            )
        if predictions.is_floating_point() or labels.is_floating_point():
            raise GraftError(
                f"predictions of type {predictions.dtype} and labels of type {labels.dtype}: expected class numbers, "
                "integers"
            )
        valid = labels != self.ignore_index
        true, found = labels[valid].long(), predictions[valid].long()
        for what, numbers in (("labels", true), ("predictions", found)):
            wrong = (numbers < 0) | (numbers >= self.num_classes)
            if wrong.any():
                raise GraftError(
                    f"{what} hold the number {int(numbers[wrong][0])}: expected 0 to {self.num_classes - 1}"
                    + (f", or {self.ignore_index} for pixels that do not count" if what == "labels" else "")
                )
        k = self.num_classes
        self.confusion += torch.bincount(true * k + found, minlength=k * k).view(k, k)

    def compute(self) -> SegmentationReport:
        """The scores of everything so far."""
        hits = self.confusion.diagonal().double()
        labelled, predicted = self.confusion.sum(1).double(), self.confusion.sum(0).double()
        # 0 / 0 is the NaN that is wanted.
        iou, accuracy = hits / (labelled + predicted - hits), hits / labelled
        return SegmentationReport(
            mean_iou=iou.nanmean(),
            mean_accuracy=accuracy.nanmean(),
            pixel_accuracy=hits.sum() / labelled.sum(),
            iou=iou,
            accuracy=accuracy,
            confusion=self.confusion.clone(),
        )
