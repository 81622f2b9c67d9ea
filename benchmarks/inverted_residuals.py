"""Conv-Adapter against LoRA and full fine-tuning on a network of inverted residuals, over five seeds.

    python benchmarks/inverted_residuals.py [--tasks counting,orientation] [--seeds 0,1,2,3,4] [--draw-only]

EfficientNet-Lite0 with ImageNet weights at 64 pixels, the bundled tasks "how many animals" and "which way up", all
their training images and 8 a class. Every method has the rate and warm-up that were best for it on validation parts
(docs/decisions/0006). Prints mean and deviation of the test accuracy. Runs are kept one by one in a JSON Lines file and
not done again.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from torchgraft.bench.grid import Cell, read_results, run_grid
from torchgraft.bench.pareto import scores, table

BACKBONE = "tf_efficientnet_lite0"
SETTINGS: dict[str, Any] = {
    "image_size": 64,
    "epochs": 10,
    "head_lr": 0.002,
    "weight_decay": 0.0001,
    "warmup": 0.1,
    "grad_clip": 5.0,
    "batch_size": 16,
    "min_epoch_steps": 16,
    "max_steps": 2000,
    "augment": "light",
}
OWN: dict[str, dict[str, Any]] = {
    "conv-adapter": {"lr": 0.015, "warmup": 0.3},
    "lora": {"lr": 0.005},
    "full": {"lr": 0.0005},
    "conv-adapter[reduction=4, norms=false]": {"lr": 0.005},
    "linear": {"lr": 0.01},
    "norm-tuning": {"lr": 0.01},
}
FEW_SHOT = ("conv-adapter", "lora", "full", "linear")
SHOTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", default="counting,orientation")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--results", type=Path, default=Path("docs/assets/inverted-residuals.jsonl"))
    parser.add_argument("--draw-only", action="store_true", help="run nothing; the tables of what is there")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tasks = [f"sample:{task}" for task in given.tasks.split(",")]
    seeds = [int(seed) for seed in given.seeds.split(",")]
    everything = [_cell(m, t, s) for s in seeds for m in OWN for t in tasks]
    few = [_cell(m, t, s, shots=SHOTS) for s in seeds for m in FEW_SHOT for t in tasks]
    if not given.draw_only:
        run_grid([*everything, *few], given.results, say=lambda line: print(line, flush=True))
    known = read_results(given.results)
    for title, cells in (("all training images", everything), (f"{SHOTS} images a class", few)):
        done = [known[c.key] for c in cells if c.key in known]
        print(f"\n{title}, seeds {given.seeds}\n\n{table(scores(done, tasks), tasks)}")


def _cell(method: str, task: str, seed: int, **options: Any) -> Cell:
    return Cell(task, BACKBONE, method, seed, {**SETTINGS, **OWN[method], **options})


if __name__ == "__main__":
    main()
