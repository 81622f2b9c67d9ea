"""A convolution with one output a group: PyTorch's grouped kernel against depthwise and sum.

    python benchmarks/grouped_convolution.py [--rounds 9]

Forward and backward on the CPU, one thread, median process CPU time over alternating rounds, at the shapes that
Conv-Adapter has in common networks on 8 images of 64 to 128 pixels; in the standard layout and with the channels last.
Where the second is not taken (:mod:`torchgraft.methods.forms.grouped`) both columns are the native kernel.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from torchgraft.core.layers import ConvGeometry
from torchgraft.lean.meter import alternating
from torchgraft.methods.forms.grouped import sum_groups

SHAPES = (
    *((16, 2, 64, 3), (24, 4, 32, 3), (40, 4, 16, 5), (80, 4, 8, 3), (112, 4, 8, 5), (192, 4, 4, 5)),
    *((64, 4, 32, 3), (128, 4, 16, 3), (256, 4, 8, 3), (512, 4, 4, 3), (256, 8, 8, 3)),
    *((96, 4, 32, 7), (192, 4, 16, 7), (384, 4, 8, 7), (768, 4, 4, 7), (384, 4, 4, 7), (768, 4, 8, 7)),
    *((672, 4, 2, 5), (512, 4, 2, 3), (1024, 4, 2, 3), (1024, 4, 4, 3)),
)
"""(channels, channels a group, side of the map, kernel)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = f"{'channels':>8} {'a group':>8} {'side':>5} {'kernel':>7} {'layout':>14}"
    print(f"{head} {'native ms':>10} {'ours ms':>8} {'ratio':>6}")
    for channels, per_group, side, kernel in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(8, channels, side, side).to(memory_format=layout).requires_grad_()
            geometry = ConvGeometry.keeping_size(2, kernel)
            convs = [geometry.build(channels, channels // per_group, groups=channels // per_group) for _ in range(2)]
            sum_groups(convs[1])

            def step(conv: torch.nn.Module, x: Tensor = x) -> None:
                conv(x).sum().backward()

            variants = {"native": lambda c=convs[0]: step(c), "sum": lambda c=convs[1]: step(c)}
            found = alternating(variants, rounds=given.rounds)
            native, ours = found["native"], found["sum"]
            name = "channels last" if layout is torch.channels_last else "standard"
            row = f"{native.seconds * 1e3:>10.2f} {ours.seconds * 1e3:>8.2f} {ours.ratio:>6.2f}"
            print(f"{channels:>8} {per_group:>8} {side:>5} {kernel:>7} {name:>14} {row}", flush=True)


if __name__ == "__main__":
    main()
