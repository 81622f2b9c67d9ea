"""Overhead per site: that the variants compute the same, and what is reported. Times themselves are not tested."""

from __future__ import annotations

import pytest
import torch

from torchgraft.bench import overhead
from torchgraft.errors import GraftError


def test_every_mechanism_is_timed_against_the_model_written_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "SITES", 3)
    rows = overhead.measure(rounds=1)
    named = {(r.what, r.mechanism) for r in rows}
    branches = {"by hand", "torchgraft", "torchgraft, lean=False", "forward hook", "wrapper", "parametrize"}
    loras = {"by hand", "torchgraft", "torchgraft, lean=False", "HF peft"}
    assert named == {("branch", m) for m in branches} | {("lora", m) for m in loras}
    for row in rows:
        if row.mechanism == "by hand":
            assert (row.forward, row.step, row.forward_ratio, row.step_ratio) == (0, 0, 1, 1)


def test_a_variant_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "SITES", 2)
    monkeypatch.setattr("torchgraft.bench.mechanisms._add_branch", lambda module, args, out: out)
    with pytest.raises(GraftError, match=r"forward hook computes something else"):
        overhead.measure(rounds=1, peft=False)


def test_the_goal_is_on_what_a_site_of_ours_adds_to_the_forward() -> None:
    rows = [overhead.Row("branch", "by hand", 0, 0, 1, 1), overhead.Row("branch", "torchgraft", 1.6, 0, 1, 1)]
    (goal,) = overhead.goals(rows)
    assert goal.value == 1.6 and goal.limit == 1.5 and goal.advisory and not goal.met


def test_timing_leaves_no_gradients_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    step = overhead._step(model, torch.ones(1, 2))
    step()
    first = model.weight.grad.clone()
    step()
    assert torch.equal(model.weight.grad, first)
