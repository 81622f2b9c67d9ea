"""``torchgraft eval``: measure a trained adapter on data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import emit_json, next_command, pairs, results_only, say, table
from .options import AsJson, Data, Device, Weights

EXAMPLES = """\
torchgraft eval runs/photos photos/
torchgraft eval runs/photos/adapter other_photos/ --part test
torchgraft eval runs/photos photos/ --json > scores.json"""


def run(
    trained: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run folder or adapter folder.")],
    data: Data,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="PART", help="train, val or test; default: test where there is one."),
    ] = None,
    weights: Weights = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a trained adapter on DATA.

    Shows the accuracy, the accuracy of every class and the mistakes made with the most confidence.
    """
    with results_only(as_json):
        from torchgraft.tasks import evaluate

        result = evaluate(trained, data, part=part, weights=weights, device=device or "auto")
    if as_json:
        emit_json(result.to_dict())
        return
    from torchgraft.tasks.quantities import interval, percent

    low, high = interval(result.accuracy, result.n)
    summary = [
        ("data", f"{result.data}, {result.part} part"),
        (
            "accuracy",
            f"{percent(result.accuracy)} of {result.n:,} images (95% interval {percent(low)} to {percent(high)})",
        ),
        ("loss", f"{result.loss:.4f}"),
    ]
    if result.top5 is not None:
        summary.insert(2, ("top-5 accuracy", percent(result.top5)))
    if result.skipped:
        summary.append(("left out", f"{len(result.skipped)} unreadable images, {result.skipped[0][0]} the first"))
    pairs(summary)
    say()
    rows = [
        (name, sum(counts), "" if share is None else percent(share))
        for name, counts, share in zip(result.classes, result.confusion, result.per_class, strict=True)
    ]
    table(("class", "images", "accuracy"), rows, right=("images", "accuracy"))
    if result.worst:
        say()
        table(
            ("worst mistakes", "true", "predicted", "confidence"),
            [(m.id, m.true, m.predicted, percent(m.confidence)) for m in result.worst[:10]],
            right=("confidence",),
        )
    next_command("Classify single images:", f"torchgraft predict {trained} IMAGE...")
