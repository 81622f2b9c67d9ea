"""Binary cross-entropy of maps of logits inside boxes.

A box in pixels, divided by the stride and cut to whole cells, is filled with 1 in the channel of its class. With m the
union of an image's boxes, as in the auxiliary loss of "DenseCLIP", arXiv:2112.01518,

    L = sum over images, classes and cells of m BCE(sigmoid(logits), target) / max(1, K sum of m)

so the loss asks which class is in the boxes, not where boxes are. A batch without boxes gives exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import GraftError

__all__ = ["BoxTargets", "box_cross_entropy", "box_targets"]


class BoxTargets(NamedTuple):
    """Filled boxes.

    Attributes:
        target: (B, K, h, w), 1 in the boxes of the class.
        inside: (B, 1, h, w), 1 in the boxes of any class.
    """

    target: Tensor
    inside: Tensor


def box_targets(
    boxes: Sequence[Tensor], classes: Sequence[Tensor], num_classes: int, size: tuple[int, int], stride: int = 4
) -> BoxTargets:
    """Fill boxes into maps; one that is thinner than a cell may leave no trace.

    Args:
        boxes: For every image x1, y1, x2, y2 in pixels (n, 4).
        classes: For every image the classes (n,), counted from 0.
        num_classes: K.
        size: (h, w) of the maps.
        stride: Pixels per cell.

    Raises:
        GraftError: The boxes and classes of an image, or of the batch, do not belong together.
    """
    if len(boxes) != len(classes) or any(len(b) != len(c) for b, c in zip(boxes, classes, strict=True)):
        raise GraftError(
            f"boxes {[len(b) for b in boxes]} and classes {[len(c) for c in classes]} per image: expected as many"
        )
    targets = []
    for found, indices in zip(boxes, classes, strict=True):
        limits = torch.tensor([size[1], size[0]] * 2, device=found.device) - 1
        cells = (found.reshape(-1, 4) / stride).long().clamp(min=0).minimum(limits)
        x1, y1, x2, y2 = cells[:, :, None].unbind(1)
        columns = torch.arange(size[1], device=found.device)
        rows = torch.arange(size[0], device=found.device)
        filled = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]
        count = torch.zeros(num_classes, *size, device=found.device)
        targets.append(count.index_add_(0, indices.long(), filled.to(count.dtype)).clamp(max=1))
    target = torch.stack(targets)
    return BoxTargets(target, target.amax(1, keepdim=True))


def box_cross_entropy(logits: Tensor, boxes: Sequence[Tensor], classes: Sequence[Tensor], *, stride: int = 4) -> Tensor:
    """The loss of the module's equation, in float32 at least; a scalar.

    Args:
        logits: (B, K, h, w).
        boxes: For every image x1, y1, x2, y2 in pixels (n, 4); n = 0 for an image without boxes.
        classes: For every image the classes (n,), counted from 0.
        stride: Pixels per cell of the logits.

    Raises:
        GraftError: Boxes, classes and logits do not belong together.
    """
    if len(boxes) != len(logits):
        raise GraftError(f"boxes of {len(boxes)} images for logits of {len(logits)}")
    target, inside = box_targets(boxes, classes, logits.shape[1], (logits.shape[2], logits.shape[3]), stride)
    precise = logits if logits.element_size() >= 4 else logits.float()
    cells = F.binary_cross_entropy_with_logits(precise, target.to(precise), reduction="none")
    return (cells * inside).sum() / (logits.shape[1] * inside.sum()).clamp(min=1)
