"""Parameter counts in the documentation are what the library counts."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

import torchgraft as tg

METHODS = Path(__file__).parents[2] / "docs" / "methods"
REDUCTIONS = (1, 2, 4, 8, 16)


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """The cells of the table whose heading line begins with ``heading``."""
    text = (METHODS / page).read_text(encoding="utf-8")
    lines = text[text.index(heading) :].splitlines()[2:]
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def number(cell: str) -> int:
    """``1,234`` as a number."""
    return int(cell.replace(",", ""))


@functools.cache
def anatomy(name: str) -> tg.Anatomy:
    """The anatomy of a timm model without data."""
    with torch.device("meta"):
        return tg.anatomy(timm.create_model(name, num_classes=0))


def count(name: str, method: str) -> int:
    """What a method adds to a timm model."""
    with torch.device("meta"):
        placements = tg.method(method).placements(anatomy(name))
    return sum(p.numel() for placement in placements for p in placement.parameters())


MAIN = list(rows("conv-adapter.md", "| model | sites |"))
KERNELS = list(rows("conv-adapter.md", "| model | kernel |"))
SCHEMES = list(rows("conv-adapter.md", "| model | scheme |"))
BASELINES = list(rows("baselines.md", "| backbone | all |"))


@pytest.mark.parametrize("row", MAIN, ids=lambda r: r[0].split("`")[0])
def test_conv_adapter_has_the_documented_number_of_parameters(row: list[str]) -> None:
    names = re.findall(r"\w+", row[0])
    for name in [n for n in names if timm.is_model(n)]:
        counted = [count(name, f"conv-adapter[reduction={r}, kernel=official]") for r in REDUCTIONS]
        assert counted == [number(cell) for cell in row[2:]], name


@pytest.mark.parametrize("row", KERNELS, ids=lambda r: f"{r[0]}-{r[1]}")
def test_conv_adapter_on_inverted_residuals_has_the_documented_number_of_parameters(row: list[str]) -> None:
    counted = [count(row[0], f"conv-adapter[reduction={r}, kernel={row[1]}]") for r in REDUCTIONS[:4]]
    assert counted == [number(cell) for cell in row[2:]]


@pytest.mark.parametrize("row", SCHEMES, ids=lambda r: f"{r[0]}-{r[1]}")
def test_the_schemes_of_conv_adapter_have_the_documented_number_of_parameters(row: list[str]) -> None:
    for reduction, cell in zip((4, 8), row[2:], strict=True):
        if cell:
            assert count(row[0], f"conv-adapter[reduction={reduction}, scheme={row[1]}]") == number(cell)


@pytest.mark.parametrize("row", BASELINES, ids=lambda r: r[0])
def test_the_baselines_train_the_documented_number_of_parameters(row: list[str]) -> None:
    backbone = sum(p.numel() for p in anatomy(row[0]).model.parameters())
    assert [backbone, count(row[0], "norm-tuning"), count(row[0], "bitfit")] == [number(c) for c in row[1:]]


def test_every_table_was_found() -> None:
    assert min(len(MAIN), len(KERNELS), len(SCHEMES), len(BASELINES)) >= 6
