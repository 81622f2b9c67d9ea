"""Tiny pictures on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def cut_off(path: Path) -> Path:
    """Keep the header and lose the end, as an interrupted copy does."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[dict[str, int]], Path]:
    """Make a folder tree from {folder: number of pictures}; every second one is a PNG, the others JPEG."""

    def make(folders: dict[str, int]) -> Path:
        root = tmp_path / "photos"
        for folder, count in folders.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                save_picture(root / folder / f"img{i}{'.png' if i % 2 else '.jpg'}", seed=i)
        return root

    return make
