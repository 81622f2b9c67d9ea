from __future__ import annotations

import dataclasses

import pytest

from torchgraft.bench.memory import Comparison, Memory, compare
from torchgraft.bench.subjects import Setting

SETTING = Setting("test_convnext", batch=2, image_size=32)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(SETTING, ["linear", "peft-lora", "lora", "ssf"], ["plain", "exact"])


def test_full_fine_tuning_comes_first_and_every_method_has_a_row_per_level(found) -> None:
    assert [(r.method, r.level) for r in found.rows] == [
        ("full", ""), ("linear", ""), ("peft-lora", ""),
        ("lora", "plain"), ("lora", "exact"), ("ssf", "plain"), ("ssf", "exact"),
    ]  # fmt: skip


def test_the_parts_add_up_to_the_whole(found) -> None:
    full = found.rows[0]
    assert full.gradients == 4 * full.trainable == full.optimiser // 2 == full.weights
    assert full.whole == full.weights + full.gradients + full.optimiser + full.saved
    lora = found.row("lora", "plain")
    assert lora.weights > full.weights, "the adapter's own tensors count"


def test_what_is_saved_is_within_what_the_allocator_saw(found) -> None:
    for row in found.rows:
        assert 0 < row.saved <= row.peak, row


def test_lean_layers_save_less_than_plain_ones_and_than_the_peer(found) -> None:
    for method in ("lora", "ssf"):
        assert found.row(method, "exact").saved < found.row(method, "plain").saved
    assert found.to("peft-lora", found.row("lora", "exact")) < 1
    assert found.to("full", found.rows[0]) == 1


def test_tensors_without_data_give_the_same_bytes_and_no_peak() -> None:
    setting = Setting("test_vit", batch=2, image_size=32)
    methods, levels = ["peft-lora", "ssf"], ["plain", "exact", "checkpoint"]
    real, counted = compare(setting, methods, levels), compare(setting, methods, levels, fake=True)
    assert counted.rows == [dataclasses.replace(r, peak=None) for r in real.rows]


def row(method: str, level: str, saved: int) -> Memory:
    return Memory(method, level, 10, saved, None, 1000, 40, 80)


def test_a_method_above_full_fine_tuning_misses_its_goal_at_level_exact_only() -> None:
    rows = [row("full", "", 100), row("ssf", "plain", 150), row("ssf[sites=all]", "exact", 101)]
    [goal] = Comparison(SETTING, rows).goals()
    assert (goal.name, goal.met) == ("saved / full, ssf exact", False)


def test_known_backbones_are_held_to_their_limits_at_the_size_these_were_set_for() -> None:
    rows = [
        row("full", "", 1000), row("peft-lora", "", 900), row("conv-adapter[reduction=4]", "exact", 124),
        row("lora", "exact", 130), row("ssf", "exact", 601),
    ]  # fmt: skip
    goals = {g.name: g for g in Comparison(Setting("resnet50"), rows).goals()}
    assert goals["saved / full, conv-adapter exact"].met
    assert goals["saved / full, ssf exact"].limit == 0.60 and not goals["saved / full, ssf exact"].met
    assert goals["saved / HF peft, lora exact"].value == pytest.approx(130 / 900)
    assert not goals["saved / HF peft, lora exact"].met
    assert "whole / full, conv-adapter exact" in goals
    small = Comparison(Setting("resnet50", image_size=64), rows).goals()
    assert {g.limit for g in small} == {1.0}
