"""The commands that look inside: floor, layers, overhead, compat, sites, compile."""

from __future__ import annotations

import json
from typing import Any

import pytest

from torchgraft.bench.layers import Row

from ..conftest import one_line_error, speak

TINY = ("--image-size", 64, "--batch", 2)


def told(*words: object) -> dict[str, Any]:
    """The JSON line of a command."""
    spoken = speak("bench", *words, "--json")
    assert spoken.code == 0, spoken.err
    assert spoken.out.count("\n") == 1
    return json.loads(spoken.out)


def test_floor_prints_the_parts_the_levels_and_the_layers_beyond_it() -> None:
    spoken = speak("bench", "floor", "test_resnet", "conv-adapter", *TINY, "--fake")
    assert spoken.code == 0, spoken.err
    lines = spoken.out.splitlines()
    assert lines[0].split() == ["MiB", "of", "floor"]
    assert [line.split()[0] for line in lines if line.startswith(("floor ", "plain", "exact"))] == [
        "floor",
        "plain",
        "exact",
    ]
    assert any(line.startswith("layers at level exact") for line in lines)
    assert "saved / floor, conv-adapter exact" in spoken.out


def test_floor_tells_programs_bytes_and_ratios() -> None:
    line = told("floor", "test_resnet", "conv-adapter", *TINY, "--fake")
    assert line["bench"] == "floor" and line["method"] == "conv-adapter"
    assert sum(line["floor"]["parts"].values()) == sum(line["floor"]["layers"].values()) == line["floor"]["bytes"]
    plain = line["levels"]["plain"]
    assert plain["ratio"] == plain["bytes"] / line["floor"]["bytes"] > 1


def test_a_method_that_does_not_exist_is_one_line() -> None:
    assert "conv-adapter" in one_line_error(speak("bench", "floor", "test_resnet", "conv-adaptor", *TINY))


def test_layers_is_a_table_of_what_is_kept_by_whom() -> None:
    line = told("layers")
    found = {row["layer"]: row for row in line["rows"]}
    assert found["Conv2d 3x3"] == {"layer": "Conv2d 3x3", "plain": 1.0, "needed": 0.0, "lean": 0.0}
    assert not line["goals"], "those that are met are not listed"


@pytest.mark.parametrize(("words", "code"), [(("--check",), 1), ((), 0)])
def test_a_layer_that_keeps_more_than_it_has_to_fails_a_check(words, code, monkeypatch) -> None:
    monkeypatch.setattr("torchgraft.bench.layers.measure", lambda *_, **__: [Row("GELU", 1.0, 1.0, 1.1)])
    spoken = speak("bench", "layers", *words)
    assert spoken.code == code
    assert "MISSED" in spoken.out


def test_overhead_gives_microseconds_per_mechanism(monkeypatch) -> None:
    monkeypatch.setattr("torchgraft.bench.overhead.SITES", 2)
    line = told("overhead", "--rounds", 1, "--no-peft")
    assert {row["mechanism"] for row in line["rows"]} >= {"by hand", "torchgraft", "forward hook", "wrapper"}
    assert line["goals"][0]["advisory"]


def test_compat_is_a_matrix_with_reasons() -> None:
    words = ("compat", "--only", "plain checkpoint", "--only", "deepcopy")
    spoken = speak("bench", *words, "--check")
    assert spoken.code == 0, spoken.err
    lines = spoken.out.splitlines()
    assert lines[0].split("  ")[0] == "check" and "torchgraft" in lines[0] and "parametrize" in lines[0]
    assert lines[1].split()[2:] == ["ok", "ok", "FAILS", "FAILS"]
    assert "keys are unknown" in spoken.out
    assert {cell["check"] for cell in told(*words)["cells"]} == {"plain checkpoint", "deepcopy"}


def test_compat_fails_a_check_when_ours_fails(monkeypatch) -> None:
    monkeypatch.setattr("torchgraft.bench.compat.attempt", lambda check, case: "it broke")
    assert speak("bench", "compat", "--only", "eager", "--check").code == 1
    assert speak("bench", "compat", "--only", "eager").code == 0


def test_sites_counts_models_that_take_a_method() -> None:
    spoken = speak("bench", "sites", "test_resnet", "--check")
    assert spoken.code == 0, spoken.err
    assert "1 of 1 models take conv-adapter" in spoken.out
    assert told("sites", "test_resnet")["rows"][0]["attached"] is True


@pytest.mark.slow
def test_compile_compares_eager_with_compiled() -> None:
    words = ("compile", "test_resnet", "--backend", "aot_eager_decomp_partition", "--rounds", 1, "--levels", "exact")
    line = told(*words, *TINY)
    assert [row["level"] for row in line["rows"]] == ["", "exact"]
    assert all(goal["met"] for goal in line["goals"])
