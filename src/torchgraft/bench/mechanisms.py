"""Four ways to put a trainable branch beside a layer of a given model, and the same branch written by hand.

The branch is one factor per channel, beside a 1x1 convolution:

    y = conv(x) + s * x

``torchgraft`` attaches it, a *forward hook* adds it, a *wrapper* module takes the convolution's place, and
*parametrize* adds diag(s) to the weight, which is the same function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.adapter import attach
from ..core.anatomy import Anatomy
from ..core.method import Method
from ..core.placements import Parallel, Placement, Point

START = 0.1
"""Value of the factors, so that the branch is seen in every output."""


class Branch(nn.Module):
    """``s * x`` per channel: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), START))

    def forward(self, x: Tensor) -> Tensor:
        """The branch."""
        return x * self.scale


class Block(nn.Module):
    """A 1x1 convolution, and what follows it."""

    def __init__(self, channels: int, *after: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.after = nn.Sequential(*after) if after else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.conv(x)
        return y if self.after is None else self.after(y)


class HandBlock(Block):
    """The same block by someone who wrote the branch into it."""

    def __init__(self, channels: int, *after: nn.Module) -> None:
        super().__init__(channels, *after)
        self.branch = Branch(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.conv(x) + self.branch(x)
        return y if self.after is None else self.after(y)


class Wrapper(nn.Module):
    """A module in the place of the convolution."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.branch = base, Branch(base.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.base(x) + self.branch(x)


class Diagonal(nn.Module):
    """The branch as a change of the weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), START))

    def forward(self, weight: Tensor) -> Tensor:
        """(C, C, 1, 1) -> (C, C, 1, 1)."""
        return weight + self.scale.diag()[:, :, None, None]


@dataclasses.dataclass(frozen=True)
class Branches(Method):
    """The benchmark's method: one branch beside every convolution of a block."""

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """From the input to the output of the convolutions."""
        return [
            Parallel(Branch(anatomy.module(path).in_channels), Point(path, "input"), Point(path, "output"))  # type: ignore[arg-type]
            for path in anatomy.modules
            if path.endswith(".conv")
        ]


def by_torchgraft(model: nn.Module, example: Tensor, *, level: str | bool = True) -> None:
    """Attach the branches."""
    attach(model, Branches(), lean=level, example=((example,), {}))


def by_hook(model: nn.Module, example: Tensor) -> None:
    """Register a forward hook on every convolution."""
    for _, block in _frozen(model):
        block.conv.branch = Branch(block.conv.in_channels)
        block.conv.register_forward_hook(_add_branch)


def by_wrapper(model: nn.Module, example: Tensor) -> None:
    """Put a wrapper in the place of every convolution."""
    for _, block in _frozen(model):
        block.conv = Wrapper(block.conv)


def by_parametrize(model: nn.Module, example: Tensor) -> None:
    """Parametrise the weight of every convolution."""
    for _, block in _frozen(model):
        parametrize.register_parametrization(block.conv, "weight", Diagonal(block.conv.in_channels))


def mechanisms(level: str | bool = True) -> dict[str, Callable[[nn.Module, Tensor], None]]:
    """Name of a mechanism and what attaches by it, given a model and an example of its input."""
    return {
        "torchgraft": functools.partial(by_torchgraft, level=level),
        "forward hook": by_hook,
        "wrapper": by_wrapper,
        "parametrize": by_parametrize,
    }


def freeze_but_branches(model: nn.Module) -> None:
    """Gradients for the factors alone, as in the model that was written by hand."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("scale"))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The factors, in the order of the blocks."""
    return [p for p in model.parameters() if p.requires_grad]


def _frozen(model: nn.Module) -> Iterator[tuple[str, Any]]:
    model.requires_grad_(False)
    yield from [(path, module) for path, module in model.named_modules() if isinstance(module, Block)]


def _add_branch(module: Any, args: Any, out: Tensor) -> Tensor:
    return out + module.branch(args[0])
