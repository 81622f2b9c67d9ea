"""Outlines of single objects: polygons and the run-length masks of the COCO format.

A polygon covers the pixels whose centre lies inside it (even-odd rule); several polygons are parts of one object.
A run-length mask counts pixels down the columns, ``(y, x) -> x * H + y``, in runs of 0, 1, 0, ...; compressed, each
count is written in base 32, lowest digit first: character minus 48 holds five bits and, as bit 5, whether another
digit follows; bit 4 of the last digit is the sign; from the fourth count on, a count is written as its
difference to the count two places earlier. Source: Microsoft COCO (https://arxiv.org/abs/1405.0312).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GraftError


@dataclass(frozen=True)
class Polygons:
    """The union of polygons.

    Attributes:
        parts: float64 (m, 2) each: x, y of the corners in pixels.
    """

    parts: tuple[np.ndarray, ...]

    def draw(self, height: int, width: int) -> np.ndarray:
        """The object's pixels, bool (height, width)."""
        mask = np.zeros((height, width), dtype=bool)
        for part in self.parts:
            mask |= _inside(part, height, width)
        return mask

    def bounds(self) -> tuple[float, float, float, float]:
        """The box around all corners: x1, y1, x2, y2."""
        corners = np.concatenate(self.parts)
        (x1, y1), (x2, y2) = corners.min(0), corners.max(0)
        return float(x1), float(y1), float(x2), float(y2)


@dataclass(frozen=True)
class RunLengths:
    """A mask as runs down the columns.

    Attributes:
        counts: int64: lengths of the runs, starting with one of zeros.
        size: (height, width) in pixels.
    """

    counts: np.ndarray
    size: tuple[int, int]

    def draw(self, height: int, width: int) -> np.ndarray:
        """The object's pixels, bool (height, width), which must be ``size``."""
        values = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(values, self.counts).reshape(width, height).T


def read_polygons(given: Sequence[Any], where: str) -> Polygons:
    """COCO polygons: a list of ``[x, y, x, y, ...]``.

    Raises:
        GraftError: A polygon has fewer than three corners, half a corner, or something that is no number.
    """
    parts: list[np.ndarray] = []
    for part in given:
        try:
            flat = np.asarray(part, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise GraftError(f"{where}: a polygon holds something that is no number; give x, y, x, y, ...") from error
        if flat.ndim != 1 or len(flat) < 6 or len(flat) % 2 or not np.isfinite(flat).all():
            raise GraftError(
                f"{where}: a polygon needs x and y of at least three corners as finite numbers, "
                f"but this one has {flat.size} values"
            )
        parts.append(flat.reshape(-1, 2))
    if not parts:
        raise GraftError(f"{where}: the segmentation is an empty list; give a polygon or a run-length mask")
    return Polygons(tuple(parts))


def read_rle(given: Any, size: tuple[int, int], where: str) -> RunLengths:
    """A COCO run-length mask: ``{"size": [height, width], "counts": text or list}``.

    Args:
        given: The value from the json.
        size: (height, width) of the picture.
        where: File and entry, for messages.

    Raises:
        GraftError: The counts cannot be decoded, or do not add up to the picture.
    """
    if not isinstance(given, dict) or not {"size", "counts"} <= set(given):
        raise GraftError(f"{where}: a run-length mask needs size and counts")
    if list(given["size"] if isinstance(given["size"], list) else []) != list(size):
        raise GraftError(
            f"{where}: the run-length mask has size {given['size']}, but the picture has height and width {list(size)}"
        )
    counts = given["counts"]
    if isinstance(counts, str):
        runs = decode_counts(counts, where)
    elif isinstance(counts, list) and all(isinstance(c, int) for c in counts):
        runs = np.asarray(counts, dtype=np.int64)
    else:
        raise GraftError(f"{where}: the counts of a run-length mask must be text or a list of whole numbers")
    if (runs < 0).any() or int(runs.sum()) != size[0] * size[1]:
        raise GraftError(
            f"{where}: the run-length mask covers {int(runs.sum())} pixels"
            f"{', with negative runs,' if (runs < 0).any() else ''} but the picture has {size[0] * size[1]}"
        )
    return RunLengths(runs, size)


def decode_counts(text: str, where: str) -> np.ndarray:
    """The runs of a compressed mask, int64.

    Raises:
        GraftError: A character is not of the code, or the text ends in the middle of a count.
    """
    runs: list[int] = []
    value = shift = 0
    for position, character in enumerate(text):
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise GraftError(f"{where}: the run-length text is damaged at character {position}, {character!r}")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift or not runs:
        raise GraftError(f"{where}: the run-length text ends in the middle of a count")
    return np.asarray(runs, dtype=np.int64)


def _inside(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Every edge toggles the pixels to the right of where it crosses the line through a row's centres."""
    toggles = np.zeros((height, width + 1), dtype=np.int32)
    for (xa, ya), (xb, yb) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        top, bottom = min(ya, yb), max(ya, yb)
        first, last = max(0, int(np.ceil(top - 0.5))), min(height, int(np.ceil(bottom - 0.5)))
        if first >= last:
            continue
        rows = np.arange(first, last)
        crossings = xa + (rows + 0.5 - ya) * (xb - xa) / (yb - ya)
        columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(np.int64)
        toggles[rows, columns] += 1
    return np.cumsum(toggles[:, :width], axis=1) % 2 == 1
