from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchgraft.bench.grid import Cell, read_results, run_grid
from torchgraft.errors import GraftError

SMALL = {"pretrained": False, "image_size": 32, "epochs": 1, "shots": 2}


def cells(folder: Path, *methods: str) -> list[Cell]:
    return [Cell(str(folder), "test_resnet", method, 0, SMALL) for method in methods]


def test_a_run_is_kept_in_the_file_and_not_done_again(pictures, tmp_path) -> None:
    file, said = tmp_path / "runs" / "results.jsonl", []
    first = run_grid(cells(pictures, "bitfit"), file, say=said.append)
    again = run_grid(cells(pictures, "bitfit", "linear"), file, say=said.append)
    key = cells(pictures, "bitfit")[0].key
    assert again[key] == first[key] and len(said) == 2
    assert [json.loads(line)["cell"]["method"] for line in file.read_text().splitlines()] == ["bitfit", "linear"]
    assert first[key].parameters > 0 and 0 <= first[key].accuracy <= 1
    assert read_results(file) == again


def test_a_method_that_does_not_apply_is_an_outcome_and_other_errors_are_errors(pictures, tmp_path) -> None:
    (outcome,) = run_grid(cells(pictures, "prefix"), tmp_path / "a.jsonl").values()
    assert outcome.refused.startswith("prefix:") and outcome.accuracy == 0
    with pytest.raises(GraftError, match="unknown method"):
        run_grid(cells(pictures, "no-such-method"), tmp_path / "a.jsonl")
    assert len(read_results(tmp_path / "a.jsonl")) == 1


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"cell": 3}\n')
    with pytest.raises(GraftError, match="line 1 is no result of a run"):
        read_results(tmp_path / "a.jsonl")
