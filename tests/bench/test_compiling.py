"""What ``bench compile`` says of a compiled model."""

from __future__ import annotations

import pytest

from torchgraft.bench.compiling import Row, goals, measure
from torchgraft.bench.subjects import Setting


@pytest.mark.slow
def test_a_compiled_lean_model_is_one_graph_that_keeps_less_and_gives_the_same_gradients() -> None:
    backend = "aot_eager_decomp_partition"
    rows = measure(Setting("test_resnet", 2, 64), ["conv-adapter"], backend=backend, rounds=1)
    assert [r.label for r in rows] == ["full", "conv-adapter plain", "conv-adapter exact"]
    assert all(g.met for g in goals(rows)), goals(rows)
    assert rows[2].compiled < rows[1].compiled < rows[0].compiled


def test_breaks_differences_and_growth_miss_the_goals() -> None:
    plain = Row("lora", "plain", 0, 100, 80, 0.5, 1e-6)
    bad = Row("lora", "exact", 2, 50, 90, 0.5, 0.1)
    missed = {g.name for g in goals([plain, bad]) if not g.met}
    assert missed == {
        "graph breaks, lora exact",
        "gradient difference, lora exact",
        "saved compiled / compiled plain, lora exact",
    }
    approximate = Row("lora", "compact", 0, 50, 40, 0.5, 9e-3)
    assert all(g.met for g in goals([plain, approximate]))
