"""Whole training memory as the operating system sees it, to confirm what `torchgraft bench memory` counts.

    python benchmarks/resident.py [MODEL] [--method conv-adapter[reduction=4]] [--batch 8] [--image-size 224] [--json]

Each variant runs in a process of its own: the model is built, two training steps are made with AdamW, and in the
second the resident size is read between forward and backward, when weights, gradients, optimiser states and everything
that is kept for the backward are there. The size before is taken off: that of a process in which the same network has
made a step and is gone again, so that the kernels that were compiled for its shapes do not count. Large blocks go back
to the system when they are freed (glibc's threshold is fixed for that), so the figures follow what is alive.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

VARIANTS = ("full", "plain", "exact", "exact-bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--method", default="conv-adapter[reduction=4]")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(measured(given)))
        return
    found = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        done = subprocess.run(
            command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True, check=True
        )
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    if given.json:
        print(json.dumps(found))
        return
    print(f"{given.model}, {given.batch} x {given.image_size} px, MiB\n")
    print(f"{'variant':<12} {'in training':>12} {'of full':>8}")
    for variant, sizes in found.items():
        print(f"{variant:<12} {sizes['resident']:>12.0f} {sizes['resident'] / found['full']['resident']:>8.3f}")


def measured(given: argparse.Namespace) -> dict[str, float]:
    """Resident MiB between forward and backward of one variant."""
    import timm
    import torch
    import torch.nn.functional as F

    import torchgraft as tg

    torch.set_num_threads(1)
    x = torch.randn(given.batch, 3, given.image_size, given.image_size)
    y = torch.zeros(given.batch, dtype=torch.long)
    gone = timm.create_model(given.model, num_classes=10)
    tg.attach(gone, given.method)
    gone.to(torch.bfloat16 if given.variant == "exact-bf16" else torch.float32).requires_grad_(True)
    gone(x.to(next(gone.parameters()).dtype)).sum().backward()
    del gone
    gc.collect()
    before = resident()
    model = timm.create_model(given.model, num_classes=10)
    if given.variant == "full":
        parameters = list(model.parameters())
    else:
        lean = "exact" if given.variant.startswith("exact") else False
        adapter = tg.attach(model, given.method, num_classes=10, lean=lean)
        if given.variant == "exact-bf16":
            tg.cast_frozen(model, torch.bfloat16)
        parameters = list(adapter.parameters())
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), y)
        held = resident()
        loss.backward()
        optimizer.step()
    return {"resident": held - before}


def resident() -> float:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
