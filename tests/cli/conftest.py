"""A tiny folder of pictures, one small trained run, and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from torchgraft.cli import app

BACKBONE = "test_convnext"


@dataclass(frozen=True)
class Spoken:
    """What a command line left behind."""

    code: int
    out: str
    err: str


def speak(*words: object) -> Spoken:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="torchgraft")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Spoken(result.exit_code, result.stdout, result.stderr)


def make_photos(folder: Path, classes: dict[str, tuple[int, int, int]], count: int = 10) -> Path:
    rng = np.random.default_rng(0)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = rng.integers(-30, 30, (32, 32, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def cli() -> Callable[..., Spoken]:
    return speak


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    return make_photos(folder, {"red": (200, 40, 40), "blue [x]": (40, 40, 200)})


@pytest.fixture(scope="session")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "photos"
    spoken = speak(*train_words(photos, out))
    assert spoken.code == 0, spoken.err
    return out


def train_words(photos: object, out: object, *more: object) -> list[object]:
    return [
        "train", photos, "--backbone", BACKBONE, "--no-pretrained", "--method", "conv-adapter", "--epochs", 1,
        "--image-size", 32, "--device", "cpu", "--out", out, *more,
    ]  # fmt: skip


def one_line_error(spoken: Spoken) -> str:
    """The error line, after checking that it is the whole of what a mistake of the user prints."""
    assert spoken.code == 2, (spoken.out, spoken.err)
    assert spoken.out == ""
    assert spoken.err.startswith("error: ") and spoken.err.count("\n") == 1, spoken.err
    return spoken.err
