"""Cross-entropy of maps of logits against label maps of another size.

    L = sum over valid pixels of CE(up(logits), labels) / max(1, number of valid pixels)

``up`` is bilinear with ``align_corners=False``. A batch without a valid pixel gives exactly 0, with gradients of 0: a
task that no image of the batch is labelled for neither counts nor leaves a parameter unused.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...data.segmentation import IGNORE_INDEX
from ...errors import GraftError

__all__ = ["IGNORE_INDEX", "pixel_cross_entropy", "upsampled"]


def pixel_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The mean over the valid pixels, in float32 at least; a scalar.

    Args:
        logits: (B, K, h, w).
        labels: Integers (B, H, W) in 0 ... K-1, or ``ignore_index``.
        ignore_index: Label of the pixels that do not count.

    Raises:
        GraftError: The shapes do not belong together, or the labels are not integers.
    """
    scores = upsampled(logits, labels)
    total = F.cross_entropy(scores, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, K, h, w) at the size of labels (B, H, W), bilinear, in float32 at least.

    Raises:
        GraftError: The shapes do not belong together, or the labels are not integers.
    """
    if logits.dim() != 4 or labels.dim() != 3 or len(logits) != len(labels):
        raise GraftError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected (B, K, h, w) and (B, H, W)"
        )
    if labels.is_floating_point():
        raise GraftError(f"labels of type {labels.dtype}: expected integers, the index of the class of every pixel")
    precise = logits if logits.element_size() >= 4 else logits.float()
    return F.interpolate(precise, size=labels.shape[-2:], mode="bilinear", align_corners=False)
