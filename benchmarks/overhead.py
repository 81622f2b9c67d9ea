"""What an attached site costs, against the same computation written by hand.

    python benchmarks/overhead.py [--rounds 41] [--json]

A net of 64 one-convolution blocks (8 channels, 4 x 4 pixels, so that Python dominates) with a per-channel
branch beside every convolution. The branch is written into the block by hand, attached by torchgraft,
added by a forward hook and by a wrapper module. Variants alternate within every round; the figures are
medians of process CPU time over the rounds. The goal is at most 1.5 us per site in the forward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Parallel, Placement, Point

SITES, CHANNELS = 64, 8


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((CHANNELS, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class HandBlock(PlainBlock):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.branch(x)


class Wrapper(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.branch = base, Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.branch(x)


@dataclasses.dataclass(frozen=True)
class ScaleBranches(tg.Method):
    """The benchmark's method: one branch beside every convolution."""

    def placements(self, anatomy: tg.Anatomy) -> list[Placement]:
        convs = [path for path in anatomy.modules if path.endswith("conv")]
        return [Parallel(Branch(), Point(p, "input"), Point(p, "output")) for p in convs]


def net(block: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = nn.Sequential(*[block() for _ in range(SITES)])
    for name, parameter in blocks.named_parameters():
        parameter.requires_grad_("branch" in name)
    return blocks


def variants() -> dict[str, nn.Module]:
    hand = net(HandBlock)
    plain_state = {k: v for k, v in hand.state_dict().items() if "branch" not in k}

    def loaded() -> nn.Sequential:
        model = net(PlainBlock)
        model.load_state_dict(plain_state)
        return model

    attached, hooked, wrapped = loaded(), loaded(), loaded()
    tg.attach(attached, ScaleBranches(), example=((torch.zeros(1, CHANNELS, 4, 4),), {}))
    for block in hooked:
        block.conv.branch = Branch()
        block.conv.register_forward_hook(lambda m, args, out: out + m.branch(args[0]))
    for block in wrapped:
        block.conv = Wrapper(block.conv)
    return {"by hand": hand, "torchgraft": attached, "forward hook": hooked, "wrapper module": wrapped}


def measure(run: dict[str, Callable[[], object]], rounds: int, inner: int = 3) -> dict[str, float]:
    """Median seconds per call of every variant, alternating within each round."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(rounds + 2):
        for name, function in run.items():
            start = time.process_time()
            for _ in range(inner):
                function()
            if turn >= 2:
                seconds[name].append((time.process_time() - start) / inner)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(2, CHANNELS, 4, 4)
    models = variants()
    reference = models["by hand"](x)
    for name, model in models.items():
        torch.testing.assert_close(model(x), reference, msg=f"{name} computes something else")

    def forward(model: nn.Module) -> Callable[[], object]:
        return lambda: torch.no_grad()(model)(x)

    def step(model: nn.Module) -> Callable[[], object]:
        return lambda: model(x).sum().backward()

    result = {}
    for label, make in (("forward", forward), ("forward+backward", step)):
        times = measure({name: make(model) for name, model in models.items()}, options.rounds)
        base = times["by hand"]
        result[label] = {
            name: {
                "us_per_site": 1e6 * t / SITES,
                "extra_us_per_site": 1e6 * (t - base) / SITES,
                "ratio": t / base,
            }
            for name, t in times.items()
        }
    if not options.json:
        print(f"{SITES} sites, one thread, medians of {options.rounds} alternating rounds")
        for label, rows in result.items():
            print(label)
            for name, row in rows.items():
                print(
                    f"  {name:<15} {row['us_per_site']:7.2f} us/site   extra {row['extra_us_per_site']:+6.2f}   "
                    f"ratio {row['ratio']:.3f}"
                )
    print(json.dumps({"benchmark": "overhead", "sites": SITES, **result}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
