"""``torchgraft bench sites``: what is found on every architecture of timm."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import results_only, say, table, working
from ..options import AsJson
from .options import Check
from .output import conclude

EXAMPLES = """\
torchgraft bench sites resnet50 vit_small_patch16_224
torchgraft bench sites --filter swin
torchgraft bench sites --method "lora[targets=all]" --check"""


def run(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models; default: the smallest of every file of timm."),
    ] = None,
    pattern: Annotated[str, typer.Option("--filter", metavar="TEXT", help="Only files whose name holds this.")] = "",
    method: Annotated[str, typer.Option("--method", metavar="METHOD", help="What is attached.")] = "conv-adapter",
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Show the sites that are found on models, those that run, and what is attached there.

    Sites run of all (in one forward); the classifier; whether addresses are the same in the two kinds of feature
    extractor; placements that act through the weight of a layer that is never called (fall-backs); and what the
    method placed and its share of the parameters, or why it refused. All of timm takes some minutes.
    """
    with results_only(as_json):
        import dataclasses
        import warnings

        import timm

        from torchgraft.bench.sites import goals, measure

        with working("building models") as tell, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = measure(models or (), pattern, method=method, say=tell)
        numbers = ("stages", "blocks", "spatial", "sites run", "fall-backs")
        cells = [
            (r.model, r.stages, r.blocks, r.spatial, r.fired, r.fallbacks, r.head or "-", r.twins, r.result)
            for r in rows
        ]
        table(("model", *numbers, "head", "feature extractors", method), cells, right=numbers)
        say(f"{sum(r.attached for r in rows)} of {len(rows)} models take {method}")
    payload = {"timm": timm.__version__, "method": method, "rows": [dataclasses.asdict(r) for r in rows]}
    conclude("sites", payload, goals(rows), as_json=as_json, check=check)
