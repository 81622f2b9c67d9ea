"""One tiny classification task and one finished run of it, shared by the tests of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from torchgraft.tasks import RunResult, TrainConfig, train

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of noisy 40 x 40 images in three tints: 16 train, 8 val and 8 test images a class."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for part, size in (("train", 16), ("val", 8), ("test", 8)):
        for channel, name in zip((2, 1, 0), CLASSES, strict=True):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(size):
                pixels = random.integers(0, 120, (40, 40, 3))
                pixels[..., channel] += int(random.integers(30, 100))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def tiny(pictures: Path) -> Callable[..., TrainConfig]:
    """Makes the settings of a run that takes about a second."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "data": str(pictures),
            "backbone": "test_resnet",
            "pretrained": False,
            "method": "conv-adapter",
            "image_size": 32,
            "epochs": 3,
            "batch_size": 16,
            "lr": 0.01,
            "head_lr": 0.1,
            "device": "cpu",
        }
        return TrainConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def finished(tiny: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A finished run; tests only read its folder."""
    return train(tiny(out=tmp_path_factory.mktemp("runs") / "finished"), progress=False)
