"""A grid of training runs: every method x task x seed, one line of results each, resumable after every run.

    cells = [Cell("sample:counting", "tf_efficientnet_lite0", "lora", seed) for seed in range(3)]
    results = run_grid(cells, Path("runs.jsonl"))

A run that is in the file is not done again, so a grid can be stopped, extended and gone on with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GraftError
from ..tasks import configure, train


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data: Data set, as on the command line.
        backbone: Name of the backbone.
        method: Method in its string form.
        seed: Start of every random choice.
        options: Settings in place of the recipe's (``lr``, ``epochs``, ``image_size``, ...).
    """

    data: str
    backbone: str
    method: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes the cell the cell it is, as text."""
        return json.dumps({**asdict(self), "options": dict(sorted(self.options.items()))}, sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: Which one.
        accuracy: On the test part (the held-out part that no choice was made on), in [0, 1].
        val_accuracy: On the validation part.
        parameters: What the method trains, without the head.
        backbone_parameters: Size of the backbone without its classifier.
        adapter_bytes: Size of the adapter's folder.
        seconds: Training time.
        refused: Why the method does not apply; the numbers are zero then.
    """

    cell: Cell
    accuracy: float = 0.0
    val_accuracy: float = 0.0
    parameters: int = 0
    backbone_parameters: int = 0
    adapter_bytes: int = 0
    seconds: float = 0.0
    refused: str = ""


def run_grid(
    cells: Iterable[Cell], results: Path, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Outcome]:
    """Run what is missing in ``results`` and return the outcomes of all ``cells`` by their keys.

    Args:
        cells: In the order in which they are run.
        results: One JSON line per finished run; appended to.
        say: Called with a line after every run.

    Raises:
        GraftError: The file holds something else.
    """
    wanted = list(cells)
    done = read_results(results)
    for number, cell in enumerate(wanted, 1):
        if cell.key in done:
            continue
        done[cell.key] = outcome = _run(cell)
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        what = (
            outcome.refused or f"test {outcome.accuracy:.3f}  val {outcome.val_accuracy:.3f}  {outcome.seconds:.0f} s"
        )
        say(f"{number}/{len(wanted)}  {cell.data}  {cell.method}  seed {cell.seed}  {what}")
    return {cell.key: done[cell.key] for cell in wanted}


def read_results(results: Path) -> dict[str, Outcome]:
    """The outcomes in a file by the keys of their cells; none where there is no file.

    Raises:
        GraftError: A line is no outcome.
    """
    found: dict[str, Outcome] = {}
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            outcome = Outcome(**{**values, "cell": Cell(**values["cell"])})
        except (ValueError, TypeError, KeyError) as error:
            raise GraftError(f"{results}: line {number} is no result of a run ({error}); move the file away") from error
        found[outcome.cell.key] = outcome
    return found


def _run(cell: Cell) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        options = {"device": "cpu", **cell.options}
        try:
            config = configure(
                cell.data,
                backbone=cell.backbone,
                method=cell.method,
                seed=cell.seed,
                out=Path(folder, "run"),
                **options,
            )
            result = train(config, progress=False)
        except GraftError as error:
            if not str(error).startswith(tuple(f"{name}:" for name in _names(cell.method))):
                raise
            return Outcome(cell, refused=str(error))
    return Outcome(
        cell,
        accuracy=result.accuracy,
        val_accuracy=result.val_accuracy,
        parameters=result.adapter_params,
        backbone_parameters=result.backbone_params,
        adapter_bytes=result.adapter_bytes,
        seconds=result.seconds,
    )


def _names(method: str) -> list[str]:
    """The names of the methods in a string form: a refusal begins with one of them."""
    return [part.strip().partition("[")[0] for part in method.split("+")]
