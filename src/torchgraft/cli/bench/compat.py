"""``torchgraft bench compat``: what goes on working with each mechanism of attaching."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import results_only, say, table, working
from ..options import AsJson
from .options import Check
from .output import conclude

EXAMPLES = """\
torchgraft bench compat --check
torchgraft bench compat --only "compile, fullgraph" --only DDP
torchgraft bench compat --level recompute"""


def run(
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="CHECK", help="Only this check; may be given several times.")
    ] = None,
    level: Annotated[
        str, typer.Option("--level", metavar="LEVEL", help="Level of torchgraft's lean layers.")
    ] = "exact",
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Show what goes on working with each mechanism of attaching.

    A branch is put beside the convolutions of a small network by torchgraft, by a forward hook, by a wrapper module
    and by a parametrisation. Under each, outputs and gradients must be those of the same network written by hand:
    compiled, exported, copied, distributed, checkpointed, under autocast and so on.
    """
    with results_only(as_json):
        import dataclasses

        import torch

        from torchgraft.bench.compat import chosen, measure
        from torchgraft.bench.goals import Goal

        torch.set_num_threads(1)
        with working("checking") as tell:
            cells = measure(chosen(only), level=level, say=tell)
        names = list(dict.fromkeys(c.mechanism for c in cells))
        verdicts: dict[str, list[str]] = {}
        for cell in cells:
            verdicts.setdefault(cell.check, []).append("FAILS" if cell.reason else "ok")
        table(("check", *names), [(name, *row) for name, row in verdicts.items()])
        if failed := [(c.check, c.mechanism, c.reason) for c in cells if c.reason]:
            say()
            table(("check", "mechanism", "why it fails"), failed)
    own = sum(c.mechanism == names[0] and bool(c.reason) for c in cells)
    payload = {"torch": torch.__version__, "level": level, "cells": [dataclasses.asdict(c) for c in cells]}
    goal = Goal(f"checks that fail, {names[0]}", own, 0)
    conclude("compat", payload, [goal], as_json=as_json, check=check)
