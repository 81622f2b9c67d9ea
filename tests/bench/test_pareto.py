from __future__ import annotations

from torchgraft.bench.grid import Cell, Outcome
from torchgraft.bench.pareto import front, picture, scores, table

TASKS = ("sample:a", "sample:b")


def outcome(method: str, task: str, accuracy: float, parameters: int, seed: int = 0, refused: str = "") -> Outcome:
    return Outcome(Cell(task, "net", method, seed), accuracy, parameters=parameters, refused=refused)


RUNS = [
    *(outcome("small", task, 0.6, 10, seed) for task in TASKS for seed in (0, 1)),
    *(outcome("good", task, 0.7 + 0.2 * seed, 100, seed) for task in TASKS for seed in (0, 1)),
    *(outcome("beaten", task, 0.5, 50) for task in TASKS),
    outcome("unfinished", "sample:a", 0.9, 5),
    *(outcome("elsewhere", task, 0.0, 0, refused="elsewhere: no place") for task in TASKS),
]


def test_scores_are_means_over_seeds_then_tasks_and_only_of_complete_methods() -> None:
    found = scores(RUNS, TASKS)
    assert [s.method for s in found] == ["good", "small", "beaten", "elsewhere"]
    mean, deviation, seeds = found[0].tasks["sample:a"]
    assert (round(mean, 6), round(deviation, 4), seeds) == (0.8, 0.1414, 2)
    assert found[-1].refused == "elsewhere: no place"


def test_the_front_holds_what_no_other_beats_at_fewer_parameters() -> None:
    assert [s.method for s in front(scores(RUNS, TASKS))] == ["small", "good"]


def test_the_table_shows_deviations_only_where_there_are_several_seeds() -> None:
    lines = table(scores(RUNS, TASKS), TASKS).splitlines()
    assert lines[0] == "| method | parameters | a | b | mean |"
    assert lines[2] == "| `good` | 100 | 80.0 ± 14.1 | 80.0 ± 14.1 | 80.0 |"
    assert lines[4] == "| `beaten` | 50 | 50.0 | 50.0 | 50.0 |"
    assert not any("elsewhere" in line for line in lines)


def test_the_picture_names_every_method_and_marks_the_front() -> None:
    figure = picture(scores(RUNS, TASKS), title="Title", footer="small print")
    (axes,) = figure.axes
    names = {text.get_text() for text in axes.texts}
    assert names == {"good", "small", "beaten"}
    assert axes.get_xscale() == "log"
    assert [list(map(float, line.get_xdata())) for line in axes.lines][-1] == [10.0, 100.0]
