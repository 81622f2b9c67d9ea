"""DCNv3: the kernel of this machine against PyTorch's operators.

    python benchmarks/dcnv3.py [--rounds 9] [--device cpu] [--dtype float32]

Forward, and forward with backward, at the four maps of InternImage-T on 4 images of 224 pixels. On the CPU one thread
and the process's own time; medians over alternating rounds. Factors are relative to ``grid_sample``, the form of the
published code that runs without an extension. What autograd keeps is counted besides the three inputs and with them.
Rows with ``softmax`` take logits: ``grid_sample`` after a softmax, the kernel with the softmax inside.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from torchgraft.lean.meter import Timing, alternating, clock_of, saved_bytes
from torchgraft.ops import backend_in_use, dcnv3

SHAPES = ((4, 56, 64, 4), (4, 28, 128, 8), (4, 14, 256, 16), (4, 7, 512, 32))
"""(images, side of the map, channels, groups)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ours = backend_in_use(given.device)
    backends = list(dict.fromkeys(["grid_sample", ours, "torch", "torchvision"]))
    print(f"{given.device}, {given.dtype}, kernel: {ours}; ms, and times faster than grid_sample")
    print(
        f"{'map':>18} {'variant':>20} {'forward':>9} {'':>6} {'f + b':>9} {'':>6} {'saved MB':>9} {'with inputs':>11}"
    )
    for shape in SHAPES:
        x, offset, logits = inputs(*shape, given.device, getattr(torch, given.dtype))
        mask = logits.unflatten(-1, (shape[3], 9)).softmax(-1).flatten(3).detach().requires_grad_()
        variants = {name: calls(x, offset, mask, shape[3], name, False) for name in backends}
        variants["grid_sample, softmax"] = calls(x, offset, logits, shape[3], "grid_sample", True)
        variants[f"{ours}, softmax"] = calls(x, offset, logits, shape[3], ours, True)
        times = [
            alternating({n: v[i] for n, v in variants.items()}, given.rounds, clock_of(given.device)) for i in range(2)
        ]
        for name, (_, _, saved) in variants.items():
            base = "grid_sample, softmax" if name.endswith("softmax") else "grid_sample"
            forward, both = (f"{t[name].seconds * 1e3:>9.2f} {faster(t, name, base):>5.1f}x" for t in times)
            sizes = f"{saved[0] / 1e6:>9.2f} {saved[1] / 1e6:>7.2f}"
            print(f"{shape!s:>18} {name:>20} {forward} {both} {sizes}", flush=True)


def inputs(n: int, side: int, channels: int, groups: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    widths = channels, groups * 18, groups * 9
    x, offset, logits = (torch.randn(n, side, side, w, device=device, dtype=dtype) for w in widths)
    return x.requires_grad_(), (0.5 * offset).requires_grad_(), logits.requires_grad_()


def calls(
    x: Tensor, offset: Tensor, mask: Tensor, groups: int, backend: str, softmax: bool
) -> tuple[Callable[[], object], Callable[[], object], tuple[int, int]]:
    """Forward, forward and backward, and the bytes kept without and with the inputs."""
    tensors = x, offset, mask

    def forward() -> Tensor:
        return dcnv3(x, offset, mask, groups=groups, softmax=softmax, backend=backend)

    def alone() -> None:
        with torch.no_grad():
            forward()

    given = torch.randn_like(x)
    return (
        alone,
        lambda: torch.autograd.grad(forward(), tensors, given),
        (
            saved_bytes(forward, own=tensors),
            saved_bytes(forward),
        ),
    )


def faster(times: dict[str, Timing], name: str, base: str) -> float:
    return times[base].ratio / times[name].ratio


if __name__ == "__main__":
    main()
