"""``torchgraft bench overhead``: what an attached site costs in Python."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import results_only, table, working
from ..options import AsJson
from .options import CheckTimes, Rounds
from .output import conclude, ratio

EXAMPLES = """\
torchgraft bench overhead
torchgraft bench overhead --rounds 101 --check-times
torchgraft bench overhead --no-peft --json"""


def run(
    rounds: Rounds = 41,
    peft: Annotated[bool, typer.Option("--peft/--no-peft", help="Time LoRA of HF peft too.")] = True,
    check_times: CheckTimes = False,
    as_json: AsJson = False,
) -> None:
    """Time an attached site beside the same computation written by hand.

    Microseconds per site above the hand-written model, on blocks so small that Python dominates: a branch beside a
    convolution, by torchgraft, a forward hook, a wrapper and a parametrisation; and LoRA, by torchgraft and by HF
    peft.
    """
    with results_only(as_json):
        import dataclasses

        import torch

        from torchgraft.bench.overhead import SITES, goals, measure

        torch.set_num_threads(1)
        with working("timing"):
            rows = measure(rounds, peft=peft)
        titles = ("forward us", "ratio", "forward + backward us", "ratio ")
        cells = [
            (r.what, r.mechanism, f"{r.forward:+.2f}", ratio(r.forward_ratio), f"{r.step:+.2f}", ratio(r.step_ratio))
            for r in rows
        ]
        table(("site", "mechanism", *titles), cells, right=titles)
    payload = {"torch": torch.__version__, "sites": SITES, "rows": [dataclasses.asdict(r) for r in rows]}
    conclude("overhead", payload, goals(rows), as_json=as_json, check_times=check_times)
