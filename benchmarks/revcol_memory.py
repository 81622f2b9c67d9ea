"""What a training step of RevCol keeps, its peak and its time, per memory mode and number of columns.

    python benchmarks/revcol_memory.py [--columns N ...] [--rounds N] [--alpha A] [--json]

A small network (channels 16, 32, 64, 128; blocks 1, 1, 2, 1), 16 images of 96 pixels, forward and backward, one thread.
Parameters and their gradients are left out of the bytes. Times are medians of rounds in which the modes take turns,
relative to ``off``. Table: docs/backbones/revcol.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from torchgraft.backbones.revcol import RevCol
from torchgraft.backbones.revcol_memory import MODES
from torchgraft.lean import meter

SIDE = 96
BATCH = 16
MIB = 2**20


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--json", action="store_true", help="one JSON document and nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1)
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


if __name__ == "__main__":
    main()
