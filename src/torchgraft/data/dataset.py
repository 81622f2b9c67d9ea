"""What every source of labelled pictures becomes: :class:`ImageDataset` parts in a
:class:`ClassificationData`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .images import open_image, to_rgb

Transform = Callable[[Image.Image], Any]

_LOOKED_AT = 64
"""Pictures, evenly spread, that :meth:`ImageDataset.fingerprint` decodes where a source tells nothing about them."""


class Pictures(Protocol):
    """A numbered collection of pictures; picklable, so that loader processes can read from it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...


class FilePictures:
    """Pictures in files, decoded when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return open_image(self.paths[index])

    def stamp(self, index: int) -> bytes:
        """What changes when the file does: its size and its time."""
        found = self.paths[index].stat()
        return f"{found.st_size} {found.st_mtime_ns}".encode()


class ArrayPictures:
    """Pictures in memory: uint8 of shape (N, H, W), grey, or (N, H, W, 3)."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Image.Image:
        return to_rgb(Image.fromarray(self.array[index]))

    def stamp(self, index: int) -> bytes:
        """The pixels."""
        return self.array[index].tobytes()


class ImageDataset(Dataset[tuple[Any, int]]):
    """Labelled pictures in a fixed order.

    ``dataset[i]`` is ``(transform(picture), label)``, or the picture itself as an RGB ``PIL.Image`` when the
    data set has no transform.

    Attributes:
        labels: Class index of every picture.
        ids: Stable name of every picture: the path below the source's root, or a name within a sample.
    """

    def __init__(
        self,
        pictures: Pictures,
        labels: Sequence[int],
        ids: Sequence[str],
        *,
        rows: Sequence[int] | None = None,
        transform: Transform | None = None,
    ) -> None:
        """Label some of ``pictures``.

        Args:
            pictures: The collection to read from.
            labels: Class index of every picture of this data set.
            ids: Name of every picture of this data set.
            rows: Which pictures of the collection these are; default all, in order.
            transform: Applied to the RGB picture.
        """
        self._pictures = pictures
        self._rows = list(range(len(pictures))) if rows is None else [int(r) for r in rows]
        self.labels = [int(label) for label in labels]
        self.ids = list(ids)
        self.transform = transform
        if not len(self._rows) == len(self.labels) == len(self.ids):
            raise ValueError(
                f"{len(self._rows)} pictures, {len(self.labels)} labels and {len(self.ids)} ids do not match"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = self.image(index)
        return (picture if self.transform is None else self.transform(picture)), self.labels[index]

    def __repr__(self) -> str:
        return f"ImageDataset({len(self)} images, {len(set(self.labels))} classes)"

    def image(self, index: int) -> Image.Image:
        """Picture ``index`` in RGB, without the transform."""
        return to_rgb(self._pictures[self._rows[index]])

    def fingerprint(self) -> str:
        """SHA-256 of names, labels and the state of the pictures, without reading them where that can be told.

        Files count by size and time, arrays by their pixels. Of other sources some pictures are decoded.
        """
        digest = hashlib.sha256()
        stamp = getattr(self._pictures, "stamp", None)
        step = max(1, len(self) // _LOOKED_AT)
        for index, (row, label, name) in enumerate(zip(self._rows, self.labels, self.ids, strict=True)):
            digest.update(f"{name}\0{label}\n".encode())
            if stamp is not None:
                digest.update(stamp(row))
            elif index % step == 0:
                digest.update(self.image(index).tobytes())
        return digest.hexdigest()

    def with_transform(self, transform: Transform | None) -> ImageDataset:
        """The same pictures seen through ``transform``."""
        return ImageDataset(self._pictures, self.labels, self.ids, rows=self._rows, transform=transform)

    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """The pictures at ``indices``, in that order, with this data set's transform."""
        return ImageDataset(
            self._pictures,
            [self.labels[i] for i in indices],
            [self.ids[i] for i in indices],
            rows=[self._rows[i] for i in indices],
            transform=self.transform,
        )


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ClassificationData:
    """A classification task: what to train on, what to select by and what to report.

    Attributes:
        name: The spec it was loaded from.
        classes: Class names, indexed by label.
        train: What the adapter is fitted to.
        val: What model selection uses.
        test: The held-out part, or None when the source has none.
        skipped: Pictures left out because they cannot be read.
        licence: Licence of the pictures where it is known.
        mirror: Whether a left-right mirrored picture keeps its label.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageDataset
    val: ImageDataset
    test: ImageDataset | None
    skipped: tuple[Skipped, ...] = ()
    licence: str | None = None
    mirror: bool = True


@dataclass
class Source:
    """What a loader found, before val is split off and shots are drawn.

    Attributes:
        name: The spec.
        classes: Class names, indexed by label.
        parts: ``"train"`` and, where the source has them, ``"val"`` and ``"test"``.
        skipped: As in :class:`ClassificationData`.
        licence: As in :class:`ClassificationData`.
        mirror: As in :class:`ClassificationData`.
    """

    name: str
    classes: tuple[str, ...]
    parts: dict[str, ImageDataset]
    skipped: tuple[Skipped, ...] = ()
    licence: str | None = None
    mirror: bool = True
