"""What a training step of RevCol keeps, its peak and its time, per memory mode and number of columns.

    python benchmarks/revcol_memory.py [--columns N ...] [--rounds N] [--alpha A] [--json]
    python benchmarks/revcol_memory.py --errors [--columns N ...] [--json]

A small network (channels 16, 32, 64, 128; blocks 1, 1, 2, 1), 16 images of 96 pixels, forward and backward, one thread.
Parameters and their gradients are left out of the bytes. Times are medians of rounds in which the modes take turns,
relative to ``off``. With ``--errors`` instead: the worst relative error of a parameter's gradient against a run in
double precision, for several alphas. Tables: docs/backbones/revcol.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch

from torchgraft.backbones.revcol import RevCol
from torchgraft.backbones.revcol_memory import MODES
from torchgraft.errors import GraftError
from torchgraft.lean import meter

SIDE = 96
BATCH = 16
MIB = 2**20
ALPHAS = (0.95, 0.9, 0.7, 0.5)


def make(columns: int, alpha: float) -> RevCol:
    """A network with random weights and all alphas equal."""
    torch.manual_seed(0)
    model = RevCol(dims=(16, 32, 64, 128), depths=(1, 1, 2, 1), columns=columns, num_classes=10).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(alpha)
            elif name.endswith("gamma"):
                parameter.fill_(0.5)
    return model


def stepper(model: RevCol, mode: str, images: torch.Tensor) -> Callable[[], None]:
    """A forward and a backward in one mode."""

    def step() -> None:
        model.set_memory_mode(mode)
        model.zero_grad(set_to_none=False)
        model(images).square().sum().backward()

    return step


def measure(columns: int, alpha: float, rounds: int) -> list[dict[str, Any]]:
    """One row per mode."""
    model, images = make(columns, alpha), torch.randn(BATCH, 3, SIDE, SIDE)
    own = [*model.parameters(), images]
    steps = {mode: stepper(model, mode, images) for mode in MODES}
    rows = []
    for mode, step in steps.items():
        step()  # from here on the gradients are there
        saved = meter.saved_bytes(lambda: model(images), own)
        rows.append({"columns": columns, "mode": mode, "saved": saved, "peak": meter.peak_bytes(step)})
    times = meter.alternating(steps, rounds)
    return [row | {"seconds": times[row["mode"]].seconds, "ratio": times[row["mode"]].ratio} for row in rows]


def gradients(model: RevCol, mode: str, images: torch.Tensor) -> list[torch.Tensor]:
    """Of all parameters."""
    model.set_memory_mode(mode)
    return list(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The worst error of a tensor relative to its largest value; gradients that are zero do not count."""
    pairs = [(a.double(), b) for a, b in zip(found, wanted, strict=True) if b.abs().max() > 1e-6]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def errors(columns: int, alpha: float) -> dict[str, Any]:
    """One row: the errors in single precision; None where the mode is refused."""
    model, images = make(columns, alpha), torch.randn(4, 3, 64, 64)
    wanted = gradients(copy.deepcopy(model).double(), "off", images.double())
    row: dict[str, Any] = {"columns": columns, "alpha": alpha}
    for mode in MODES:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                row[mode] = error(gradients(model, mode, images), wanted)
                row["warns"] = bool(caught)
        except GraftError:
            row[mode] = None
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--errors", action="store_true", help="errors of the gradients in place of bytes and times")
    parser.add_argument("--json", action="store_true", help="one JSON document and nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.errors:
        print_errors([errors(columns, alpha) for alpha in ALPHAS for columns in given.columns], given.json)
        return
    rows = [row for columns in given.columns for row in measure(columns, given.alpha, given.rounds)]
    if given.json:
        print(json.dumps({"batch": BATCH, "side": SIDE, "alpha": given.alpha, "rows": rows}))
        return
    print("| columns | mode | saved MiB | peak MiB | seconds | relative to off |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['columns']} | {row['mode']} | {row['saved'] / MIB:.1f} | {row['peak'] / MIB:.1f} "
            f"| {row['seconds']:.3f} | {row['ratio']:.2f} |"
        )


def print_errors(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A table, or one JSON document."""
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    print("| alpha | columns | off | recompute | reversible |")
    print("|---|---|---|---|---|")
    for row in rows:
        back = "refused" if row["reversible"] is None else f"{row['reversible']:.0e}" + " (warns)" * row["warns"]
        print(f"| {row['alpha']} | {row['columns']} | {row['off']:.0e} | {row['recompute']:.0e} | {back} |")


if __name__ == "__main__":
    main()
