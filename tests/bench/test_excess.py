"""What levels keep, against the floor."""

from __future__ import annotations

import pytest

from torchgraft.bench.excess import Comparison, Reached, compare, unmatched
from torchgraft.bench.floor import Floor, Kept
from torchgraft.bench.subjects import Setting

TINY = Setting("test_convnext", 2, 64)


def test_level_exact_keeps_at_least_the_floor_and_plain_more() -> None:
    found = compare(TINY, "conv-adapter", ("plain", "exact"), fake=True)
    plain, exact = found.reached
    assert found.floor.bytes <= exact.bytes < plain.bytes
    assert found.ratio(exact) == exact.bytes / found.floor.bytes


def test_the_same_is_measured_with_and_without_data() -> None:
    real, fake = (
        compare(Setting("test_resnet", 2, 64), "conv-adapter", ("exact",), fake=fake).reached[0]
        for fake in (False, True)
    )
    assert real == fake


def test_what_plain_pytorch_keeps_beyond_the_floor_is_told_by_layer() -> None:
    (plain,) = compare(Setting("test_resnet", 2, 64), "conv-adapter", ("plain",), fake=True).reached
    assert plain.beyond["BatchNorm2d"][0] > 0 and plain.beyond["BatchNorm2d"][1] == 0


def test_entries_of_one_size_are_paired_in_the_same_module_first_then_around_it() -> None:
    kept = [("a.x", 4), ("a.y", 8), ("b.x", 8)]
    assert unmatched(kept, [("b.x", 8), ("a.z", 8), ("c", 2)]) == ([("a.x", 4)], [("c", 2)])
    assert unmatched([("a.x", 4), ("a.x", 4)], [("b", 4)]) == ([("a.x", 4)], [])
    assert unmatched([], []) == ([], [])


@pytest.mark.parametrize(
    ("model", "kept", "met"),
    [
        ("resnet50", 105, True),
        ("resnet50", 106, False),
        ("efficientnet_lite0", 108, True),
        ("efficientnet_lite0", 109, False),
    ],
)
def test_level_exact_is_held_to_a_ratio(model: str, kept: int, met: bool) -> None:
    floor = Floor((Kept(100, "norms", "norm", "LayerNorm"),))
    reached = Reached("exact", (("norm", kept),), {})
    (goal,) = Comparison(Setting(model), "ssf", floor, (Reached("plain", (("norm", 900),), {}), reached)).goals()
    assert goal.met is met
