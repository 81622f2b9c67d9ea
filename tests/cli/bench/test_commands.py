from __future__ import annotations

import json

import pytest

from torchgraft.cli.bench import COMMANDS

from ..conftest import one_line_error, speak

TINY = ["--image-size", 32, "--batch", 2]
CALLS = {
    "memory": ["memory", "test_convnext", "--methods", "ssf", *TINY],
    "step": ["step", "test_convnext", "--methods", "ssf", "--rounds", 1, *TINY],
    "peft": ["peft", "test_convnext", "--levels", "exact", "--rounds", 1, *TINY],
    "delta": ["delta", "test_convnext", *TINY],
    "equal": ["equal", "test_convnext", "lora", "--levels", "exact", *TINY],
}
COLUMNS = {
    "memory": ("saved", "peak", "optimiser", "whole", "saved/full"),
    "step": ("operations/full", "time/full", "efficiency"),
    "peft": ("saved/peft", "time/peft", "switch ms", "difference"),
    "delta": ("file bytes", "of full", "output change"),
    "equal": ("gradient", "output", "largest at"),
}


def test_the_help_of_the_group_names_every_command() -> None:
    spoken = speak("bench", "--help")
    assert spoken.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in spoken.out
    assert "torchgraft bench memory" in spoken.out.split("Examples:")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_of_that_command(command: str) -> None:
    spoken = speak("bench", command, "--help")
    assert spoken.code == 0
    assert f"torchgraft bench {command}" in spoken.out.split("Examples:")[1]


@pytest.mark.parametrize("command", CALLS)
def test_people_get_a_table_and_programs_one_line_of_json(command: str) -> None:
    spoken = speak("bench", *CALLS[command])
    assert spoken.code == 0, spoken.err
    heading = spoken.out.splitlines()[0]
    assert all(column in heading for column in COLUMNS[command])
    assert "{" not in spoken.out

    spoken = speak("bench", *CALLS[command], "--json")
    assert spoken.code == 0, spoken.err
    assert spoken.out.count("\n") == 1
    told = json.loads(spoken.out)
    assert (told["bench"], told["model"], told["batch"], told["image_size"]) == (command, "test_convnext", 2, 32)
    assert told["rows"]
    assert all({"name", "value", "limit", "met"} <= set(goal) for goal in told["goals"])
    assert heading.split()[0] in spoken.err, "the table goes to people all the same"


@pytest.mark.parametrize(("value", "words", "code"), [(0.009, ["--check"], 0), (0.02, ["--check"], 1), (0.02, [], 0)])
def test_a_missed_goal_is_exit_code_1_only_when_asked(value, words, code, monkeypatch) -> None:
    from torchgraft.bench.equal import Difference, Equality

    def measured(setting, method, levels, say):
        return Equality(setting, method, [Difference("compact", value, "x", 0.0)])

    monkeypatch.setattr("torchgraft.bench.equal.differences", measured)
    spoken = speak("bench", "equal", "test_convnext", "lora", *words)
    assert spoken.code == code
    assert ("MISSED" in spoken.out) == (value == 0.02)


@pytest.mark.parametrize(("words", "code"), [(["--check"], 0), (["--check-times"], 1)])
def test_a_missed_goal_on_time_fails_only_when_times_are_asked_for(words, code, monkeypatch) -> None:
    from torchgraft.bench.step_time import Race, Step

    rows = [Step("full", "", 3, 3, 1.0, 1.0, 1.0), Step("conv-adapter", "exact", 3, 1, 0.9, 0.9, 0.7)]
    monkeypatch.setattr("torchgraft.bench.step_time.race", lambda setting, *_, rounds, say: Race(setting, rounds, rows))
    spoken = speak("bench", "step", "resnet50", *words)
    assert spoken.code == code
    assert "missed (advisory)" in spoken.out


def test_mistakes_are_one_line_with_the_nearest_name() -> None:
    spoken = speak("bench", "memory", "resnet5", "--image-size", 32)
    assert (spoken.code, spoken.out) == (2, "")
    assert spoken.err.splitlines()[-1].startswith("error: ") and "resnet50" in spoken.err
    assert "'fp32'" in one_line_error(speak("bench", "memory", "resnet18", "--dtype", "fp23"))
    spoken = speak("bench", "equal", "test_vit", "lora", "--levels", "exakt", *TINY)
    assert spoken.code == 2 and "'exact'" in spoken.err.splitlines()[-1]
