"""Two tasks about the arrangement of shapes rather than their kind, generated from animal silhouettes.

The shapes are real silhouettes, the composition is synthetic. The silhouettes are divided first (100 per
animal for test pictures, 50 for val, the rest for training), so no shape is in two parts. The test and val
pictures are always the same ones; the seed moves the training pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from .dataset import ArrayPictures, ImageDataset
from .recordings import ANIMALS, divide, silhouettes

HIGHEST_COUNT = 6
ORIENTATIONS = tuple(f"{k * 45} deg" for k in range(8))

_TEST_SEED, _VAL_SEED = 99, 98
_GRID = 4

Draw = Callable[[np.ndarray, int, np.random.RandomState], np.ndarray]


def counting(*, seed: int, per_class: int, size: int, highest: int) -> dict[str, ImageDataset]:
    """How many animals are in the picture, 1 to ``highest``; they sit in a 4x4 grid and do not overlap.

    Args:
        seed: Moves the training pictures.
        per_class: Training pictures per number.
        size: Side of a picture in pixels.
        highest: The largest number.
    """

    def draw(shapes: np.ndarray, label: int, rng: np.random.RandomState) -> np.ndarray:
        cell = size // _GRID
        canvas = np.full((size, size), rng.randint(0, 80), np.float32)
        for spot in rng.permutation(_GRID * _GRID)[: label + 1]:
            side = rng.randint(cell * 2 // 3, cell)
            shape = Image.fromarray(shapes[rng.randint(len(shapes))])
            alpha = np.asarray(shape.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
            grey = rng.randint(130, 256)
            left = (spot % _GRID) * cell + rng.randint(0, cell - side + 1)
            top = (spot // _GRID) * cell + rng.randint(0, cell - side + 1)
            view = canvas[top : top + side, left : left + side]
            view[:] = view * (1 - alpha) + grey * alpha
        return canvas.clip(0, 255).astype(np.uint8)

    return _generate("counting", draw, classes=highest, train=per_class, val=20, test=100, seed=seed)


def orientation(*, seed: int, per_class: int, size: int) -> dict[str, ImageDataset]:
    """By which of eight angles an animal was turned, within 8 degrees.

    Half of the animals are mirrored before they are turned, so left and right give nothing away.

    Args:
        seed: Moves the training pictures.
        per_class: Training pictures per angle.
        size: Side of a picture in pixels.
    """

    def draw(shapes: np.ndarray, label: int, rng: np.random.RandomState) -> np.ndarray:
        shape = Image.fromarray(shapes[rng.randint(len(shapes))])
        shape = shape.resize((size * 5 // 7,) * 2, Image.Resampling.BICUBIC)
        if rng.rand() < 0.5:
            shape = shape.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas = Image.new("L", (size, size))
        canvas.paste(shape, (size // 7, size // 7))
        angle = label * 360 / len(ORIENTATIONS) + rng.uniform(-8, 8)
        return np.asarray(canvas.rotate(angle, Image.Resampling.BICUBIC))

    return _generate("orientation", draw, classes=len(ORIENTATIONS), train=per_class, val=20, test=60, seed=seed)


def _generate(
    name: str, draw: Draw, *, classes: int, train: int, val: int, test: int, seed: int
) -> dict[str, ImageDataset]:
    parts: dict[str, ImageDataset] = {}
    streams = {"train": 100 + seed, "val": _VAL_SEED, "test": _TEST_SEED}
    for part, shapes in _shape_pools():
        count = {"train": train, "val": val, "test": test}[part]
        rng = np.random.RandomState(streams[part])
        labels = [k for k in range(classes) for _ in range(count)]
        pictures = ArrayPictures(np.stack([draw(shapes, k, rng) for k in labels]))
        source = f"{name}/{part}" if part != "train" else f"{name}/{part}-{seed}"
        parts[part] = ImageDataset(pictures, labels, [f"{source}/{i:05d}" for i in range(len(labels))])
    return parts


def _shape_pools() -> Iterator[tuple[str, np.ndarray]]:
    images, labels, clean = silhouettes()
    rest = min(np.bincount(labels[clean])) - 150
    rows = divide(labels, clean, train=rest, val=50, test=100, seed=0, names=ANIMALS, what="silhouettes")
    for part, chosen in rows.items():
        yield part, images[chosen]
