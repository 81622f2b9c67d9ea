"""Cells that are refused: with the reason, and with nothing changed."""

from __future__ import annotations

import pytest
import torch

import torchgraft as tg

from .cells import REFUSALS, REFUSED, attach
from .families import FAMILIES, network, run
from .snapshot import Snapshot


@pytest.mark.parametrize(("method", "family"), REFUSALS)
def test_a_refusal_says_why_and_leaves_the_model_as_it_was(method: str, family: str) -> None:
    model, batch = network(family), FAMILIES[family].batch()
    before, out = Snapshot(model), run(model, batch)
    with pytest.raises(tg.GraftError) as refusal:
        attach(model, method)
    assert REFUSED[method][family] in str(refusal.value)
    assert "\n" not in str(refusal.value)
    before.assert_same()
    assert torch.equal(run(model, batch), out)


def test_only_registered_methods_and_known_families_are_listed_as_refused() -> None:
    assert set(REFUSED) <= set(tg.methods())
    assert {family for families in REFUSED.values() for family in families} <= set(FAMILIES)


def test_every_method_is_accepted_by_several_families_and_every_family_accepts_several_methods() -> None:
    refused = {(m, f) for m, families in REFUSED.items() for f in families}
    for method in tg.methods():
        assert sum((method, f) not in refused for f in FAMILIES) >= 10
    for family in FAMILIES:
        assert sum((m, family) not in refused for m in tg.methods()) >= 3
