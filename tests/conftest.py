"""Options and settings of the whole suite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# The tests are tiny: more threads only slow them down, and several workers share the cores.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        metavar="DIR",
        type=Path,
        default=Path(__file__).parent / "golden" / "cases",
        help="run the golden cases NAME.json + NAME.safetensors of this folder (default: %(default)s)",
    )


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of noisy 40 x 40 images in three tints: 16 train, 8 val and 8 test images a class."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for part, size in (("train", 16), ("val", 8), ("test", 8)):
        for channel, name in zip((2, 1, 0), ("blue", "green", "red"), strict=True):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(size):
                pixels = random.integers(0, 120, (40, 40, 3))
                pixels[..., channel] += int(random.integers(30, 100))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root
