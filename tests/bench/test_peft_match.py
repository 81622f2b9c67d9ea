from __future__ import annotations

import pytest

from torchgraft.bench.peft_match import match
from torchgraft.bench.subjects import Setting


@pytest.mark.parametrize("model", ["test_vit", "test_convnext"])
def test_both_libraries_compute_the_same_from_the_same_values_and_ours_keeps_less(model: str) -> None:
    found = match(Setting(model, batch=2, image_size=64), ["plain", "exact"], rounds=1)
    theirs, plain, exact = found.rows
    assert theirs.ratio == 1 and theirs.difference == 0
    assert plain.memory.trainable == exact.memory.trainable == theirs.memory.trainable
    assert exact.memory.saved < theirs.memory.saved
    assert plain.file == pytest.approx(theirs.file, rel=0.2)
    assert 0 < plain.switch < 1
    missed = [g.name for g in found.goals() if not g.met and not g.advisory]
    assert missed == []


def test_values_that_are_not_shared_show_as_a_difference(monkeypatch) -> None:
    monkeypatch.setattr("torchgraft.bench.peft_match.give_to_peft", lambda adapter, model: None)
    found = match(Setting("test_vit", batch=1, image_size=32), ["plain"], rounds=1)
    assert found.rows[1].difference > 1e-2
