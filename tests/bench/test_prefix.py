from __future__ import annotations

from torchgraft.bench.prefix import Prefixes, Start, prefixes
from torchgraft.bench.subjects import Setting

SETTING = Setting("test_vit", batch=2, image_size=32)


def test_every_start_keeps_less_computation_and_the_very_same_gradients() -> None:
    found = prefixes(SETTING, "lora", rounds=1)
    assert [row.first for row in found.rows] == ["blocks[1:]", "blocks[3:]", "blocks[4:]", "head"]
    assert all(row.exact for row in found.rows)
    assert all(0 < row.error < 0.01 for row in found.rows)
    blocks, probe = found.rows[:-1], found.rows[-1]
    assert {row.bytes_per_image for row in blocks} == {5 * 64 * 2}
    assert probe.bytes_per_image == 64 * 2
    assert probe.of_image == 64 * 2 / (3 * 32 * 32)
    saved = [row.saved_cached for row in found.rows]
    assert saved == sorted(saved, reverse=True)
    assert all(goal.met for goal in found.goals())


def test_a_first_part_below_which_nothing_can_be_kept_is_told() -> None:
    found = prefixes(SETTING, "bitfit", rounds=1)
    assert found.refused == {} or all("prefix cache" in reason for reason in found.refused.values())
    assert {row.first for row in found.rows} | set(found.refused) == {"blocks[1:]", "blocks[3:]", "blocks[4:]", "head"}


def test_a_changed_gradient_misses_the_goal_and_a_slow_step_is_advisory() -> None:
    row = Start("stages[2:]", "output of layer2", 100, 0.1, 10, 10, 0.6, 0.9, 1e-3, exact=False)
    goals = Prefixes(Setting("resnet50"), "conv-adapter", 3, 1.0, [row], {}).goals()
    assert [(goal.met, goal.advisory) for goal in goals] == [(False, False), (False, True)]
