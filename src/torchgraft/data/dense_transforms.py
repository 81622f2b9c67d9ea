"""Transforms that move pictures, boxes and masks together.

========  =============================================  ==============================================
augment   detection, training                            segmentation, training
========  =============================================  ==============================================
light     long side to the size, mirrored                whole picture to the square, mirrored
none      long side to the size                          whole picture to the square
standard  colours, zoom out, crop that keeps some box    scale 0.5-2, crop in which no class covers
          (SSD, https://arxiv.org/abs/1512.02325),       more than 75 %, mirrored, colours
          long side to the size, mirrored                (mmsegmentation's usual recipe)
========  =============================================  ==============================================

Evaluation is that of *none*. Detectors normalise by themselves, so their images stay in 0..1; images for
segmentation are normalised here with the backbone's mean and standard deviation. In detection, training leaves out
the boxes around crowds and what a crop leaves smaller than a pixel; evaluation keeps every box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..errors import GraftError, nearest
from .detection import PairTransform
from .segmentation import IGNORE_INDEX
from .transforms import Augment

_PER_BOX = ("boxes", "labels", "area", "iscrowd", "masks")
_LARGEST_SHARE = 0.75
_CROPS = 10
_KEYS = {"detection": ("task", "image_size"), "segmentation": ("task", "image_size", "mean", "std")}


@dataclass(frozen=True)
class DenseTransforms:
    """The two transforms of a dense task and the plain values they were made from.

    Attributes:
        train: (image, target) -> (float image, target), random.
        eval: (image, target) -> (float image, target), the same every time.
        config: JSON values; :func:`dense_eval_from` makes ``eval`` from them again.
    """

    train: PairTransform
    eval: PairTransform
    config: dict[str, Any]


def detection_transforms(image_size: int, *, augment: Augment = "light", mirror: bool = True) -> DenseTransforms:
    """The transforms of a detection task.

    Args:
        image_size: Long side of the pictures, in pixels; the sides keep their ratio.
        augment: See the table in this module's description.
        mirror: Whether training may mirror pictures left-right.

    Raises:
        GraftError: An unknown ``augment``, or a size that is not positive.
    """
    _check(image_size, augment)
    config = {"task": "detection", "image_size": image_size, "augment": augment, "mirror": mirror}
    steps: list[nn.Module] = [WithoutCrowds()]
    if augment == "standard":
        # An IoU crop looks for a crop that shows a box, in vain where there is none.
        steps += [v2.RandomPhotometricDistort(), v2.RandomZoomOut(side_range=(1.0, 2.0)), IfBoxes(v2.RandomIoUCrop())]
    steps.append(_long_side(image_size))
    if mirror and augment != "none":
        steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_aligned), Areas()]
    return DenseTransforms(v2.Compose([*steps, _unit_range()]), dense_eval_from(config), config)


def segmentation_transforms(
    image_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Augment = "light",
    mirror: bool = True,
    ignore_index: int = IGNORE_INDEX,
) -> DenseTransforms:
    """The transforms of a segmentation task.

    Args:
        image_size: Side of the square input in pixels.
        mean: Mean of every channel, of values in 0..1.
        std: Standard deviation of every channel.
        augment: See the table in this module's description.
        mirror: Whether training may mirror pictures left-right.
        ignore_index: What mask pixels beyond the picture's border become.

    Raises:
        GraftError: An unknown ``augment``, or a size that is not positive.
    """
    _check(image_size, augment)
    size = [image_size, image_size]
    config = {
        "task": "segmentation",
        "image_size": image_size,
        "mean": [float(v) for v in mean],
        "std": [float(v) for v in std],
        "augment": augment,
        "mirror": mirror,
        "ignore_index": ignore_index,
    }
    steps: list[nn.Module] = []
    if augment == "standard":
        steps += [v2.ScaleJitter(size, (0.5, 2.0)), VariedCrop(image_size, ignore_index), v2.RandomPhotometricDistort()]
    else:
        steps.append(v2.Resize(size, antialias=True))
    if mirror and augment != "none":
        steps.append(v2.RandomHorizontalFlip())
    train = v2.Compose([*steps, _unit_range(), v2.Normalize(config["mean"], config["std"])])
    return DenseTransforms(train, dense_eval_from(config), config)


def dense_eval_from(config: Mapping[str, Any]) -> PairTransform:
    """Rebuild the evaluation transform from the ``config`` of :class:`DenseTransforms`, as it is kept in a file.

    The result also takes a picture alone, as prediction needs.

    Raises:
        GraftError: A value is missing.
    """
    task = config.get("task")
    if task not in _KEYS:
        raise GraftError(f"the transform's configuration has task {task!r}; {nearest(str(task), _KEYS)}")
    missing = [key for key in _KEYS[task] if key not in config]
    if missing:
        raise GraftError(f"the transform's configuration lacks {', '.join(missing)}; it needs {', '.join(_KEYS[task])}")
    size = config["image_size"]
    if task == "detection":
        return v2.Compose([v2.ToImage(), _long_side(size), v2.ClampBoundingBoxes(), Areas(), _unit_range()])
    steps = [v2.ToImage(), v2.Resize([size, size], antialias=True), _unit_range()]
    return v2.Compose([*steps, v2.Normalize(config["mean"], config["std"])])


class WithoutCrowds(nn.Module):
    """Leaves out the boxes that stand for a crowd: a detector would learn one large object from them."""

    def forward(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(image, target) -> the same with n smaller."""
        keep = ~target["iscrowd"]
        if keep.all():
            return image, target
        kept = {k: tv_tensors.wrap(v[keep], like=v) if k in _PER_BOX else v for k, v in target.items()}
        return image, kept


class IfBoxes(nn.Module):
    """Applies a transform to pictures that have boxes."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(image, target) -> (image, target)."""
        return self.transform(image, target) if len(target["boxes"]) else (image, target)


class Areas(nn.Module):
    """Measures ``area`` anew, since the transforms of torchvision do not scale it: of masks, else of boxes."""

    def forward(self, image: Any, target: dict[str, Any] | None = None) -> Any:
        """(image, target) -> (image, target); a picture alone stays as it is."""
        if target is None:
            return image
        if "masks" in target:
            area = target["masks"].as_subclass(Tensor).flatten(1).sum(1).float()
        else:
            x1, y1, x2, y2 = target["boxes"].as_subclass(Tensor).unbind(1)
            area = (x2 - x1) * (y2 - y1)
        return image, target | {"area": area}


class VariedCrop(nn.Module):
    """A random crop, drawn up to ten times until no class covers more than 75 % of it.

    Pictures smaller than the crop are filled up: black in the image, ``ignore_index`` in the mask.
    """

    def __init__(self, size: int, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: ignore_index}
        self.crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)

    def forward(self, image: Any, mask: Any) -> tuple[Any, Any]:
        """Image (3, H, W) and mask (H, W) -> the crops (3, size, size) and (size, size)."""
        for _ in range(_CROPS):
            cropped = self.crop(image, mask)
            counts = torch.unique(cropped[1][cropped[1] != self.ignore_index], return_counts=True)[1]
            if len(counts) > 1 and counts.max() <= _LARGEST_SHARE * counts.sum():
                break
        return cropped


def _aligned(inputs: tuple[Any, dict[str, Any]]) -> list[Tensor]:
    """What is kept or left out together with a box; masks are found by their type."""
    return [inputs[1][key] for key in ("labels", "area", "iscrowd")]


def _long_side(size: int) -> nn.Module:
    return v2.Resize(None, max_size=size, antialias=True)


def _unit_range() -> nn.Module:
    return v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)


def _check(image_size: int, augment: str) -> None:
    if augment not in get_args(Augment):
        raise GraftError(f"unknown augment {augment!r}; {nearest(str(augment), get_args(Augment))}")
    if image_size < 1:
        raise GraftError(f"image_size={image_size}: the side of the input in pixels must be positive")
