"""Activations in a file: one row per image, memory-mapped, and the data set that reads them in place of pictures.

A file is ``NAME.npy`` (NumPy's format: rows in the order of memory, bfloat16 as its 16 bits) with ``NAME.json``
beside it, which says what the rows were computed from. Both are written whole or not at all; a file without its
description, or with another one than is asked for, does not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import write_files
from ..core.cut import Cut
from ..errors import GraftError
from .dataset import ImageDataset

_AS_NUMPY = {torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8", torch.bfloat16: "<u2"}


class ActivationFile:
    """The rows of one part of a data set.

    Args:
        path: The file, ending in ``.npy``.
        cut: What is kept.
        dtype: Type in the file.
        count: Number of images.
    """

    def __init__(self, path: Path, cut: Cut, dtype: torch.dtype, count: int) -> None:
        self.path, self.cut, self.dtype, self.count = path, cut, dtype, count
        self._rows: Any = None

    @property
    def bytes(self) -> int:
        """Size of the rows."""
        return self.count * self.cut.bytes_per_image(self.dtype)

    def holds(self, origin: dict[str, Any]) -> bool:
        """Whether the file is there, whole, and was computed from ``origin``."""
        if read_origin(self.path) != origin or not self.path.is_file():
            return False
        try:
            self._open()
        except (OSError, ValueError):
            return False
        return True

    def write(self, rows: Iterable[Tensor], origin: dict[str, Any]) -> None:
        """Write all rows, batch by batch, and what they were computed from.

        Raises:
            GraftError: The disk is full or cannot be written, or a value does not fit the type; nothing is left then.
        """
        self._rows = None
        write_files(
            self.path.parent,
            {
                self.path.name: lambda path: self._write(path, rows),
                self.path.with_suffix(".json").name: lambda path: path.write_text(
                    json.dumps(origin, indent=2) + "\n", encoding="utf-8"
                ),
            },
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        rows = self._rows if self._rows is not None else self._open()
        row = torch.from_numpy(np.array(rows[index]))
        return self.cut.from_rows((row.view(self.dtype) if self.dtype == torch.bfloat16 else row)[None])[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # a loader process maps the file itself instead of getting a copy

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.count, *(self.cut.shape[axis] for axis in self.cut.order))

    def _open(self) -> Any:
        rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if rows.shape != self._shape or rows.dtype.str != _AS_NUMPY[self.dtype]:
            raise ValueError(f"{self.path} holds {rows.dtype} {rows.shape}")
        self._rows = rows
        return rows

    def _write(self, path: Path, batches: Iterable[Tensor]) -> None:
        header = {"descr": _AS_NUMPY[self.dtype], "fortran_order": False, "shape": self._shape}
        # Written, not mapped: on a full disk a write fails with a reason, where a mapped page would kill the process.
        with path.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)  # type: ignore[arg-type]
            for batch in batches:
                rows = self.cut.to_rows(batch, self.dtype)
                self._check(batch, rows)
                file.write(rows.cpu().flatten().view(torch.uint8).numpy().data)

    def _check(self, batch: Tensor, rows: Tensor) -> None:
        if bool(torch.isfinite(rows).all()):
            return
        if bool(torch.isfinite(batch).all()):
            raise GraftError(
                f"prefix cache: the {self.cut} has values up to {float(batch.abs().max()):.3g}, more than float16 "
                "holds; keep it as float32 with -o cache_dtype=float32"
            )
        raise GraftError(f"prefix cache: the {self.cut} is not finite for some image; look at weights and images")


class ActivationDataset(ImageDataset):
    """What a network makes of the pictures of a data set, in place of the pictures: ``(activation, label)``.

    Args:
        file: One row per picture.
        images: The pictures; their labels and names are taken over.
        rows: Which rows of the file these are; default all, in order.
    """

    def __init__(self, file: ActivationFile, images: ImageDataset, rows: Sequence[int] | None = None) -> None:
        super().__init__(file, images.labels, images.ids, rows=rows)  # type: ignore[arg-type]
        self.file = file

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.file[self._rows[index]], self.labels[index]

    def with_transform(self, transform: Any) -> ActivationDataset:
        """The same data set: the transform came before the network."""
        return self

    def subset(self, indices: Sequence[int]) -> ActivationDataset:
        """The activations at ``indices``, in that order."""
        return ActivationDataset(self.file, super().subset(indices), [self._rows[i] for i in indices])


def read_origin(path: Path) -> dict[str, Any] | None:
    """What the rows in a file were computed from; None where that is not written, or not readable."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
