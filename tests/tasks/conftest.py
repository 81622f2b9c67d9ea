"""One tiny classification task and one finished run of it, shared by the tests of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchgraft.tasks import RunResult, TrainConfig, train


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
