"""Options and settings of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
