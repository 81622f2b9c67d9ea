from __future__ import annotations

import pytest

from torchgraft.bench.delta import CHANGE, Delta, Stored, stored
from torchgraft.bench.subjects import Setting
from torchgraft.core.checkpoint import DTYPES

SETTING = Setting("test_convnext", batch=2, image_size=32)


def test_every_storage_type_is_written_loaded_and_compared() -> None:
    found = stored(SETTING, "conv-adapter[reduction=4]")
    rows = {r.dtype: r for r in found.rows}
    assert set(rows) == set(DTYPES) == set(CHANGE)
    assert rows["fp32"].change == 0 < rows["fp16"].change < rows["bf16"].change
    assert rows["fp16"].file == pytest.approx(rows["fp32"].file / 2, rel=0.1)
    assert all(g.met for g in found.goals())


def test_the_full_file_is_that_of_the_backbone_alone() -> None:
    sizes = {stored(SETTING, method).full for method in ("conv-adapter", "ssf")}
    assert len(sizes) == 1
    assert sizes.pop() == pytest.approx(4 * 207_778, rel=0.05)


def test_known_backbones_have_a_limit_for_the_file() -> None:
    rows = [Stored("fp32", 1, 1 / 59, 0.0, 1.0), Stored("fp16", 1, 1 / 121, 2e-3, 1.0)]
    missed = [g.name for g in Delta(Setting("resnet50"), "conv-adapter[reduction=4]", 1, rows).goals() if not g.met]
    assert missed == ["output change, fp16", "file / full, fp32"]
