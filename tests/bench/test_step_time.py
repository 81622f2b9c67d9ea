from __future__ import annotations

import pytest

from torchgraft.bench.step_time import Race, Step, race, training_step
from torchgraft.bench.subjects import Setting, subject

SETTING = Setting("test_convnext", batch=2, image_size=32)


def test_every_variant_is_told_relative_to_full_fine_tuning() -> None:
    said: list[str] = []
    found = race(SETTING, ["linear", "ssf"], ["plain"], rounds=1, say=said.append)
    full, linear, ssf = found.rows
    assert (full.ratio, full.of_flops, full.efficiency) == (1, 1, 1)
    assert full.backward == pytest.approx(2 * full.forward, rel=0.05), "a gradient of inputs and one of weights"
    assert linear.backward < 0.01 * full.backward
    assert linear.of_flops < ssf.of_flops < 0.75
    assert said == ["full", "linear", "ssf plain", "alternating rounds"]


def test_a_step_trains_what_is_trained_and_nothing_else() -> None:
    one = subject(SETTING, "ssf")
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    training_step(one)()
    changed = {n for n, p in one.model.named_parameters() if not p.equal(before[n])}
    assert len(changed) == len(one.trained())
    assert all("torchgraft" in name for name in changed)


def test_goals_on_time_are_advisory() -> None:
    rows = [
        Step("full", "", 100, 200, 1.0, 1.0, 1.0), Step("peft-lora", "", 100, 100, 0.7, 0.7, 0.67),
        Step("conv-adapter", "exact", 100, 100, 0.9, 0.9, 0.67), Step("lora", "exact", 100, 100, 0.7, 0.71, 0.67),
    ]  # fmt: skip
    goals = {g.name: g for g in Race(Setting("resnet50"), 3, rows).goals()}
    assert all(g.advisory for g in goals.values())
    assert not goals["time / full, conv-adapter exact"].met
    assert not goals["time / operations, conv-adapter exact"].met
    assert goals["time / HF peft, lora exact"].met
