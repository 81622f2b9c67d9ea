"""Every architecture of ours beside the timm model of about equal operations, in rounds that take turns.

    python benchmarks/backbones.py [--side 128] [--batch 4] [--rounds 5] [--json] [OURS ...]

Per pair: multiply-adds, CPU time of a forward and of a training step (forward and backward of all parameters) of
ours relative to timm's, images per second, and the bytes that autograd keeps (linear in the batch). Each runs in the
memory format that `torchgraft.prefers_channels_last` names. InternImage's operator has its own table:
`python benchmarks/dcnv3.py`; RevCol's memory modes `python benchmarks/revcol_memory.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.lean.meter import alternating, flops, saved_bytes

PAIRS = {
    "hornet_tiny_7x7": "convnext_tiny",
    "hornet_tiny_gf": "convnext_tiny",
    "g_ghost_regnetx_032": "regnetx_016",
    "hatnet_tiny": "pvt_v2_b1",
    "revcol_tiny": "convnext_tiny",
    "internimage_tiny": "swin_tiny_patch4_window7_224",
}
"""Ours and the nearest model of timm by multiply-adds at 224 pixels."""


class Subject:
    """One model with an image batch, in its preferred memory format."""

    def __init__(self, name: str, side: int, batch: int) -> None:
        torch.manual_seed(0)
        sized = {"img_size": side} if name.startswith(("swin", "vit")) else {}
        self.model = timm.create_model(name, **sized).eval()
        layout = torch.channels_last if tg.prefers_channels_last(self.model) else torch.contiguous_format
        self.layout = "last" if layout == torch.channels_last else "first"
        self.model.to(memory_format=layout)
        self.images = torch.randn(batch, 3, side, side).contiguous(memory_format=layout)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """One inference."""
        return self.model(self.images)

    def step(self) -> None:
        """Forward and backward of every parameter."""
        self.model.zero_grad()
        self.model(self.images).square().mean().backward()

    def saved(self) -> int:
        """Bytes kept for the backward."""
        own = (*self.model.parameters(), *self.model.buffers(), self.images)
        return saved_bytes(lambda: self.model(self.images), own)

    def gmacs(self) -> float:
        """Multiply-adds of one image."""
        return flops(self.forward) / 2e9 / len(self.images)


def compare(ours: str, theirs: str, side: int, batch: int, rounds: int) -> dict[str, object]:
    """One row: ours beside timm's."""
    subjects = {theirs: Subject(theirs, side, batch), ours: Subject(ours, side, batch)}
    forward = alternating(_runs(subjects, "forward"), rounds)
    step = alternating(_runs(subjects, "step"), rounds)
    mine, base = subjects[ours], subjects[theirs]
    return {
        "ours": ours,
        "timm": theirs,
        "gmacs": [round(mine.gmacs(), 3), round(base.gmacs(), 3)],
        "channels": [mine.layout, base.layout],
        "images_per_second": [round(batch / forward[name].seconds, 1) for name in (ours, theirs)],
        "forward_ratio": round(forward[ours].ratio, 2),
        "step_ratio": round(step[ours].ratio, 2),
        "saved_mib_per_image": [round(s.saved() / batch / 2**20, 1) for s in (mine, base)],
        "parameters": [_parameters(s.model) for s in (mine, base)],
    }


def _runs(subjects: dict[str, Subject], what: str) -> dict[str, Callable[[], object]]:
    return {name: getattr(subject, what) for name, subject in subjects.items()}


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ours", nargs="*", metavar="OURS", help=f"default: {', '.join(PAIRS)}")
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    given = parser.parse_args()
    if unknown := [name for name in given.ours if name not in PAIRS]:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(PAIRS)}")
    torch.set_num_threads(1)
    if not given.json:
        print("| ours | timm | GMACs | parameters | images/s | forward | step | saved MiB an image |")
        print("|---|---|---|---|---|---:|---:|---|")
    for ours in given.ours or PAIRS:
        row = compare(ours, PAIRS[ours], given.side, given.batch, given.rounds)
        print(json.dumps(row) if given.json else _line(row), flush=True)


def _line(row: dict) -> str:
    def both(key: str, form: str = "{}") -> str:
        return " / ".join(form.format(value) for value in row[key])

    cells = [
        f"`{row['ours']}`",
        f"`{row['timm']}`",
        both("gmacs"),
        both("parameters", "{:,}"),
        both("images_per_second"),
    ]
    cells += [f"{row['forward_ratio']:.2f}", f"{row['step_ratio']:.2f}", both("saved_mib_per_image")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
