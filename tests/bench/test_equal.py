"""Every level keeps its promise: 4 architectures x 4 methods, with values that leave no branch invisible."""

from __future__ import annotations

import pytest
import torch

from torchgraft.bench.equal import PROMISES, differences, relative
from torchgraft.bench.subjects import Setting

METHODS = ("ssf", "lora", "bitfit")
MODELS = {
    "resnet10t": "conv-adapter[reduction=4]",
    "efficientnet_lite0": "conv-adapter[reduction=4]",
    "test_convnext": "conv-adapter[reduction=4]",
    "test_vit": "vpt-deep[num_tokens=4]",
}


@pytest.mark.parametrize("method", ["own", *METHODS])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_the_same_at_every_level_bit_for_bit(model: str, method: str) -> None:
    spec = MODELS[model] if method == "own" else method
    found = differences(Setting(model, batch=2, image_size=64), spec)
    assert [r.level for r in found.rows] == ["folded", *PROMISES]
    missed = [(g.name, g.value) for g in found.goals() if not g.met]
    assert missed == []


def test_folding_and_compact_change_something_so_that_the_comparison_is_one() -> None:
    found = differences(Setting("efficientnet_lite0", batch=2, image_size=64), "lora", ["compact"])
    folded, compact = found.rows
    assert folded.output > 0 and folded.gradient > 0
    assert compact.gradient > 0 and compact.where


@pytest.mark.parametrize("level", ["exact", "recompute"])
def test_a_gradient_that_differs_is_found_and_named(level: str, monkeypatch) -> None:
    from torchgraft.bench import equal

    real = equal._run

    def wrong(one):
        out, gradients = real(one)
        if one.level == level:
            gradients["head.weight"] = gradients["head.weight"] * (1 + 2**-20)
        return out, gradients

    monkeypatch.setattr(equal, "_run", wrong)
    _, row = differences(Setting("test_convnext", batch=1, image_size=32), "lora", [level]).rows
    assert row.where == "head.weight" and 0 < row.gradient < 1e-5


def test_a_gradient_that_is_not_a_number_misses_the_goal(monkeypatch) -> None:
    from torchgraft.bench import equal

    real = equal._run

    def wrong(one):
        out, gradients = real(one)
        if one.level == "exact":
            gradients["head.bias"] = gradients["head.bias"] * float("nan")
        return out, gradients

    monkeypatch.setattr(equal, "_run", wrong)
    found = differences(Setting("test_convnext", batch=1, image_size=32), "lora", ["exact"])
    assert [g.name for g in found.goals() if not g.met] == ["gradient, exact"]


def test_a_relative_difference_is_zero_only_for_equal_values() -> None:
    a = torch.tensor([1.0, 2.0])
    assert relative(a, a) == 0
    assert relative(a, torch.tensor([1.0, 2.5])) == pytest.approx(0.2)
    assert relative(torch.zeros(2), torch.zeros(2)) == 0
    assert relative(a, torch.zeros(2)) == float("inf")
