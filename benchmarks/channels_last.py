"""Step time with the channels last relative to the standard layout, in rounds that take turns.

    python benchmarks/channels_last.py [--lean LEVEL] [--rounds N] [MODEL ...]

One line of JSON per model: the share of its operations that are convolutions of maps, what
`torchgraft.prefers_channels_last` says, and the median ratio of CPU times of a training step of Conv-Adapter
(forward, backward and AdamW; 8 images of 128 pixels, one thread). Table: docs/decisions/0008-channels-last.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import timm
import torch
from torch.nn import functional as F

import torchgraft as tg
from torchgraft.core.memory_format import map_share
from torchgraft.core.probe import dry_run
from torchgraft.lean.meter import alternating

MODELS = (
    "resnet18",
    "resnet50",
    "tf_efficientnet_lite0",
    "mobilenetv3_large_100",
    "regnety_004",
    "convnext_atto",
    "convnext_tiny",
    "vit_tiny_patch16_224",
)
SIDE = 128
BATCH = 8


def make_step(name: str, lean: str, channels_last: bool) -> Callable[[], None]:
    """A training step of Conv-Adapter on random weights and images."""
    torch.manual_seed(0)
    model = timm.create_model(name, **_sized(name))
    adapter = tg.attach(model, "conv-adapter", num_classes=10, lean=lean)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.train().to(memory_format=layout)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images.contiguous(memory_format=layout)), labels).backward()
        optimizer.step()

    return step


def _sized(name: str) -> dict[str, int]:
    return {"img_size": SIDE} if name.startswith(("vit", "maxvit")) else {}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--lean", default="exact")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.models:
        model = timm.create_model(name, **_sized(name))
        trace = dry_run(model)
        share = map_share(model, trace) if trace else None
        steps = {layout: make_step(name, given.lean, layout == "last") for layout in ("standard", "last")}
        times = alternating(steps, given.rounds)
        print(
            json.dumps(
                {
                    "model": name,
                    "lean": given.lean,
                    "share": None if share is None else round(share, 2),
                    "prefers": tg.prefers_channels_last(model),
                    "seconds": round(times["standard"].seconds, 3),
                    "ratio": round(times["last"].ratio, 2),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
