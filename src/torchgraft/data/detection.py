"""Detection data: what every source of pictures with boxes becomes.

An item is ``(image, target)`` with ``image`` a ``tv_tensors.Image`` (3, H, W) uint8 and ``target``:

===========  ==================================================  =========================================
key          value                                               meaning
===========  ==================================================  =========================================
boxes        ``tv_tensors.BoundingBoxes`` (n, 4) float32         x1, y1, x2, y2 in pixels
labels       int64 (n,)                                          1..K; 0 is the background of a detector
masks        ``tv_tensors.Mask`` (n, H, W) bool                  only where the data have instance masks
area         float32 (n,)                                        square pixels, of the object where the
                                                                 source says so, else of its mask or box
iscrowd      bool (n,)                                           one box around many objects
image_id     int                                                 the source's number of the picture
===========  ==================================================  =========================================

A picture without objects has the same keys with n = 0.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import GraftError
from .dataset import Skipped
from .images import open_image

PairTransform = Callable[[Any, Any], tuple[Any, Any]]
"""(image, target) -> (image, target)."""

_ROUNDING = 0.05
"""A box may reach this many pixels over the border before it counts as clipped: what two decimals in a json or
six in a YOLO file leave over."""

_ORIENTATION = 0x0112
_SIDEWAYS = range(5, 9)


class Shape(Protocol):
    """The outline of one object, drawn when its picture is read; picklable."""

    def draw(self, height: int, width: int) -> np.ndarray:
        """The object's pixels, bool (height, width)."""
        ...


@dataclass(frozen=True)
class Annotated:
    """A picture and its objects.

    Attributes:
        path: The picture's file.
        id: Stable name of the picture.
        image_id: The source's number of the picture.
        size: (height, width) in pixels, upright.
        boxes: float32 (n, 4): x1, y1, x2, y2 in pixels.
        labels: int64 (n,) in 1..K.
        area: float32 (n,) in square pixels.
        iscrowd: bool (n,).
        shapes: The outlines of the n objects, or None.
    """

    path: Path
    id: str
    image_id: int
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    shapes: tuple[Shape, ...] | None = None


class DetectionDataset(Dataset[tuple[Any, dict[str, Any]]]):
    """Pictures with boxes in a fixed order; an item is described at the head of this module.

    Attributes:
        records: The pictures and their objects.
        transform: Applied to (image, target).
    """

    def __init__(self, records: Sequence[Annotated], transform: PairTransform | None = None) -> None:
        self.records = list(records)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        record = self.records[index]
        image = tv_tensors.Image(F.pil_to_tensor(self.image(index)))
        height, width = record.size
        if tuple(image.shape[-2:]) != record.size:
            raise GraftError(
                f"{record.path} is {image.shape[-1]}x{image.shape[-2]} pixels, but was {width}x{height} when the data "
                "were loaded; load them again"
            )
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
                torch.from_numpy(record.boxes.copy()).reshape(-1, 4), format="XYXY", canvas_size=record.size
            ),
            "labels": torch.from_numpy(record.labels.copy()),
            "area": torch.from_numpy(record.area.copy()),
            "iscrowd": torch.from_numpy(record.iscrowd.copy()),
            "image_id": record.image_id,
        }
        if record.shapes is not None:
            drawn = np.zeros((len(record.shapes), height, width), dtype=bool)
            for layer, shape in zip(drawn, record.shapes, strict=True):
                layer[:] = shape.draw(height, width)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(drawn))
        return (image, target) if self.transform is None else self.transform(image, target)

    def __repr__(self) -> str:
        return f"DetectionDataset({len(self)} images, {sum(len(r.labels) for r in self.records)} boxes)"

    @property
    def ids(self) -> list[str]:
        """Stable name of every picture."""
        return [record.id for record in self.records]

    def image(self, index: int) -> Image.Image:
        """Picture ``index`` in RGB, without the transform."""
        return open_image(self.records[index].path)

    def fingerprint(self) -> str:
        """SHA-256 of names, boxes, labels and the size and time of the files."""
        digest = hashlib.sha256()
        for record in self.records:
            found = record.path.stat()
            digest.update(f"{record.id}\0{found.st_size} {found.st_mtime_ns}\n".encode())
            digest.update(record.boxes.tobytes() + record.labels.tobytes())
        return digest.hexdigest()

    def with_transform(self, transform: PairTransform | None) -> DetectionDataset:
        """The same pictures seen through ``transform``."""
        return DetectionDataset(self.records, transform)

    def subset(self, indices: Sequence[int]) -> DetectionDataset:
        """The pictures at ``indices``, in that order, with this data set's transform."""
        return DetectionDataset([self.records[i] for i in indices], self.transform)


@dataclass(frozen=True)
class DetectionData:
    """A detection task: what to train on, what to select by and what to report.

    Attributes:
        name: The path it was loaded from.
        classes: Class names; label k is ``classes[k - 1]``.
        train: What the detector is fitted to.
        val: What model selection uses.
        test: The held-out part, or None when the source has none.
        category_ids: The source's number of every class, in the order of ``classes``.
        has_masks: Whether every target has instance masks.
        skipped: Pictures left out because they cannot be read.
        clipped: Boxes cut at the border of their picture.
        dropped: Boxes left out because they have no area.
    """

    name: str
    classes: tuple[str, ...]
    train: DetectionDataset
    val: DetectionDataset
    test: DetectionDataset | None
    category_ids: tuple[int, ...]
    has_masks: bool = False
    skipped: tuple[Skipped, ...] = ()
    clipped: int = 0
    dropped: int = 0

    def label_of(self, category_id: int) -> int:
        """The label, in 1..K, of the source's ``category_id``.

        Raises:
            GraftError: The source has no such category.
        """
        if category_id not in self.category_ids:
            raise GraftError(f"{self.name} has no category {category_id}; it has {list(self.category_ids)}")
        return self.category_ids.index(category_id) + 1

    def category_of(self, label: int) -> int:
        """The source's category id of ``label``, which is in 1..K.

        Raises:
            GraftError: There is no such label.
        """
        if not 1 <= label <= len(self.category_ids):
            raise GraftError(f"label {label} is none of {self.name}; labels are 1..{len(self.category_ids)}")
        return self.category_ids[label - 1]


@dataclass
class DetectionSource:
    """What a loader found, before val is split off; the attributes are those of :class:`DetectionData`."""

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    parts: dict[str, list[Annotated]]
    skipped: tuple[Skipped, ...] = ()


@dataclass
class BoxCheck:
    """Brings boxes into their picture and counts what it had to change.

    Attributes:
        strict: Refuse boxes that reach over the border or have no area, instead of counting them.
        clipped: Boxes cut at the border.
        dropped: Boxes left out because they have no area.
    """

    strict: bool = False
    clipped: int = 0
    dropped: int = 0
    _examples: list[str] = field(default_factory=list)

    def __call__(self, box: Sequence[float], size: tuple[int, int], where: str) -> tuple[float, ...] | None:
        """Check one box.

        Args:
            box: x1, y1, x2, y2 in pixels.
            size: (height, width) of the picture.
            where: File and entry, for messages.

        Returns:
            The box inside the picture, or None if it has no area.

        Raises:
            GraftError: The box is not finite, reversed or entirely outside the picture; or ``strict``.
        """
        x1, y1, x2, y2 = (float(v) for v in box)
        height, width = size
        shown = f"({x1:g}, {y1:g}, {x2:g}, {y2:g})"
        if not np.isfinite([x1, y1, x2, y2]).all():
            raise GraftError(f"{where}: the box {shown} is not finite; give four numbers")
        if x2 < x1 or y2 < y1:
            raise GraftError(f"{where}: the box {shown} has a negative width or height; correct or remove it")
        if x2 == x1 or y2 == y1:
            if self.strict:
                raise GraftError(f"{where}: the box {shown} has no area; remove it, or leave strict off to drop it")
            self.dropped += 1
            self._examples.append(where)
            return None
        if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
            raise GraftError(
                f"{where}: the box {shown} is outside its picture of {width}x{height} pixels; correct or remove it"
            )
        if max(-x1, -y1, x2 - width, y2 - height) > _ROUNDING:
            if self.strict:
                raise GraftError(
                    f"{where}: the box {shown} reaches outside its picture of {width}x{height} pixels; correct it, or "
                    "leave strict off to clip it"
                )
            self.clipped += 1
            self._examples.append(where)
        return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))

    def report(self, name: str) -> None:
        """Warn once, with counts, about what was changed."""
        if self._examples:
            warnings.warn(
                f"{name}: {self.clipped} boxes clipped at the border of their picture and {self.dropped} boxes without "
                f"area dropped, the first one: {self._examples[0]}",
                stacklevel=4,
            )


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture as :func:`open_image` gives it, from the header alone.

    Raises:
        GraftError: The file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
    except Exception as error:
        raise GraftError(f"cannot read the image {path}: {' '.join(str(error).split())}") from error
    return (width, height) if sideways else (height, width)


def collate_detection(batch: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """A batch as lists, since pictures differ in size and objects in number.

    Args:
        batch: Items of a :class:`DetectionDataset`.

    Returns:
        The images and the targets.
    """
    return [image for image, _ in batch], [target for _, target in batch]
