"""Segmentation data: pictures and masks that give every pixel a class.

An item is ``(image, mask)``: ``tv_tensors.Image`` (3, H, W) uint8 and ``tv_tensors.Mask`` (H, W) int64 with classes
0..K-1 and ``ignore_index`` where nobody knows. A mask comes from a file, or is painted from instance masks: class 0
where there is no object, label k else, small objects over large ones and crowds ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import GraftError
from .dataset import Skipped
from .detection import Annotated, PairTransform
from .images import open_image

IGNORE_INDEX = 255
"""The value of a pixel that counts neither in training nor in evaluation."""


class SegmentationDataset(Dataset[tuple[Any, Any]]):
    """Pictures with masks in a fixed order; an item is described at the head of this module.

    Attributes:
        images: Files of the pictures.
        masks: Files of the masks, or the pictures' objects with their outlines.
        ids: Stable name of every picture.
        mapping: int64 (65536,): value in the file -> class or ignore index.
        ignore_index: The value of pixels that do not count.
        transform: Applied to (image, mask).
    """

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path | Annotated],
        ids: Sequence[str],
        mapping: np.ndarray,
        ignore_index: int = IGNORE_INDEX,
        transform: PairTransform | None = None,
    ) -> None:
        self.images = list(images)
        self.masks = list(masks)
        self.ids = list(ids)
        self.mapping = mapping
        self.ignore_index = ignore_index
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = tv_tensors.Image(F.pil_to_tensor(self.image(index)))
        source = self.masks[index]
        values = (
            paint(source, self.ignore_index) if isinstance(source, Annotated) else self.mapping[read_mask(source)[0]]
        )
        mask = tv_tensors.Mask(torch.from_numpy(values))
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def __repr__(self) -> str:
        return f"SegmentationDataset({len(self)} images)"

    def image(self, index: int) -> Image.Image:
        """Picture ``index`` in RGB, without the transform."""
        return open_image(self.images[index])

    def fingerprint(self) -> str:
        """SHA-256 of names and of the size and time of pictures and masks."""
        digest = hashlib.sha256(self.mapping.tobytes())
        for name, image, mask in zip(self.ids, self.images, self.masks, strict=True):
            digest.update(f"{name}\0".encode())
            if isinstance(mask, Annotated):
                digest.update(mask.boxes.tobytes() + mask.labels.tobytes())
            for file in (image,) if isinstance(mask, Annotated) else (image, mask):
                found = file.stat()
                digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def with_transform(self, transform: PairTransform | None) -> SegmentationDataset:
        """The same pictures seen through ``transform``."""
        return SegmentationDataset(self.images, self.masks, self.ids, self.mapping, self.ignore_index, transform)

    def subset(self, indices: Sequence[int]) -> SegmentationDataset:
        """The pictures at ``indices``, in that order, with this data set's transform."""
        return SegmentationDataset(
            [self.images[i] for i in indices],
            [self.masks[i] for i in indices],
            [self.ids[i] for i in indices],
            self.mapping,
            self.ignore_index,
            self.transform,
        )


@dataclass(frozen=True)
class SegmentationData:
    """A segmentation task: what to train on, what to select by and what to report.

    Attributes:
        name: The path it was loaded from.
        classes: Class names, indexed by the values of a mask.
        palette: (red, green, blue) of every class where the masks have a palette.
        ignore_index: The value of pixels that do not count.
        train: What the model is fitted to.
        val: What model selection uses.
        test: The held-out part, or None when the source has none.
        skipped: Pictures left out because they cannot be read.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] | None
    ignore_index: int
    train: SegmentationDataset
    val: SegmentationDataset
    test: SegmentationDataset | None
    skipped: tuple[Skipped, ...] = ()


@dataclass
class SegmentationSource:
    """What the loader found, before val is split off; the attributes are those of :class:`SegmentationData`."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] | None
    ignore_index: int
    parts: dict[str, SegmentationDataset]
    skipped: tuple[Skipped, ...] = ()


def read_mask(path: Path) -> tuple[np.ndarray, tuple[tuple[int, int, int], ...] | None]:
    """The class numbers in a mask file, (H, W) whole numbers, and its palette.

    Raises:
        GraftError: The file cannot be read, or holds colours or fractions in place of class numbers.
    """
    try:
        with Image.open(path) as image:
            values, mode, flat = np.asarray(image), image.mode, image.getpalette() if image.mode == "P" else None
    except Exception as error:
        raise GraftError(f"cannot read the mask {path}: {' '.join(str(error).split())}") from error
    if values.ndim == 3 and all((values[..., k] == values[..., 0]).all() for k in (1, 2)) and mode == "RGB":
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "uib" or (values.size and not int(values.min()) >= 0):
        raise GraftError(
            f"the mask {path} holds {'colours' if values.ndim == 3 else 'values'} ({mode}) in place of class numbers; "
            "save it with a palette or as grey values 0, 1, 2, ..."
        )
    if values.size and int(values.max()) >= 1 << 16:
        raise GraftError(f"the mask {path} holds the value {int(values.max())}; class numbers end at 65535")
    palette = None
    if flat:
        palette = tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat) - 2, 3))
    return values.astype(np.int64), palette


def paint(record: Annotated, ignore_index: int) -> np.ndarray:
    """The class of every pixel, int64 (H, W), from instance masks: 0 where there is no object.

    Args:
        record: A picture whose objects have outlines.
        ignore_index: What the pixels of a crowd become.
    """
    mask = np.zeros(record.size, dtype=np.int64)
    shapes = record.shapes or ()
    # Large objects first and crowds before all, so that what lies on top of them stays visible.
    for i in sorted(range(len(shapes)), key=lambda i: (not record.iscrowd[i], -record.area[i])):
        mask[shapes[i].draw(*record.size)] = ignore_index if record.iscrowd[i] else record.labels[i]
    return mask


def collate_segmentation(batch: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch as (images (N, 3, H, W), masks (N, H, W)); all pictures must have one size.

    Args:
        batch: Items of a :class:`SegmentationDataset`.
    """
    images, masks = zip(*batch, strict=True)
    return torch.stack(images).as_subclass(Tensor), torch.stack(masks).as_subclass(Tensor)
