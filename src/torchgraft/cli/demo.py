"""``torchgraft demo``: see on real weights and pictures what an adapter does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .console import emit_json, next_command, note, results_only, say, table
from .options import AsJson

EXAMPLES = """\
torchgraft demo                      linear probe against Conv-Adapter: count animals
torchgraft demo --compare            and full fine-tuning
torchgraft demo --task animals --out runs/animals"""


def run(
    compare: Annotated[bool, typer.Option("--compare", help="Fine-tune the whole backbone too.")] = False,
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="counting, animals or orientation.")] = "counting",
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything goes; an earlier demo is replaced.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Start of all random choices.")] = 0,
    as_json: AsJson = False,
) -> None:
    """See on real weights and pictures what an adapter does.

    A linear probe and a Conv-Adapter learn the same task on EfficientNet-Lite0 with ImageNet weights; their
    accuracy and cost are compared, and the saved adapter is checked on a freshly created backbone.
    """
    with results_only(as_json):
        from torchgraft.bench.demo import BACKBONE, LABELS, run_demo

        result = run_demo(out, task=task, compare=compare, seed=seed, say=note)
    if as_json:
        note(f"verified: {result.verified}")
        emit_json([asdict(row) for row in result.rows])
        return
    from torchgraft.tasks.quantities import duration, percent, size

    say()
    numeric = ("accuracy", "trained parameters", "of the backbone", "adapter on disk", "time", "peak memory")
    table(
        ("method", *numeric),
        [
            (
                LABELS[row.method],
                percent(row.accuracy),
                f"{row.trainable_params:,}",
                percent(row.trainable_params / row.backbone_params),
                size(row.adapter_bytes),
                duration(row.seconds),
                size(row.peak_rss_mb * 1e6),
            )
            for row in result.rows
        ],
        right=numeric,
    )
    say()
    say(f"verified: {result.verified}")
    say(f"picture:  {result.picture}")
    say(f"report:   {result.report}")
    next_command(
        "Your turn, with a folder that has one folder of images for each class:",
        f"torchgraft train YOUR_FOLDER --backbone {BACKBONE} --method conv-adapter",
    )
