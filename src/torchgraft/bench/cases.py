"""The network of ``bench compat`` under one mechanism, the values it has to give, and how values are compared."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .mechanisms import Block, HandBlock, freeze_but_branches, trained

CHANNELS, SIDE, BATCH = 8, 8, 2
RTOL, ATOL = 1e-4, 1e-5
ROUGH = 5e-2
"""Accepted difference under autocast, relative to the largest value: bfloat16 has 8 bits."""

Values = tuple[Tensor, list[Tensor]]
"""Output and the gradients of the factors."""


class Net(nn.Module):
    """A small network with a layer of every lean kind: (N, 3, H, W) -> (N, 3).

    Attributes:
        segment: Runs the blocks; gradient checkpointing puts itself here.
    """

    segment: Callable[..., Tensor] | None = None

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        c = CHANNELS
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.blocks = nn.Sequential(
            block(c, nn.BatchNorm2d(c), nn.ReLU(inplace=True)),
            block(c, nn.BatchNorm2d(c), nn.ReLU6()),
            block(c, nn.Conv2d(c, c, 3, padding=1, groups=c), nn.Hardswish()),
            block(c, nn.AvgPool2d(2), nn.LeakyReLU()),
        )
        self.pool = nn.MaxPool2d(2)
        self.norm, self.fc, self.act = nn.LayerNorm(c), nn.Linear(c, c), nn.GELU()
        self.head = nn.Linear(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3)."""
        x = self.stem(x)
        x = self.blocks(x) if self.segment is None else self.segment(self.blocks, x)
        x = self.pool(x).permute(0, 2, 3, 1)
        x = self.act(self.fc(self.norm(x)))
        return self.head(x.mean((1, 2)))


class Case:
    """One mechanism, with fresh models of it and the values that they have to give."""

    def __init__(self, mechanism: str, attach_by: Callable[[nn.Module, Tensor], None], seed: int = 0) -> None:
        self.mechanism, self.attach_by, self.seed = mechanism, attach_by, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.x = torch.randn(BATCH, 3, SIDE, SIDE)

    def plain(self, seed: int | None = None) -> Net:
        """The network without branches."""
        return _net(Block, self.seed if seed is None else seed)

    def model(self) -> Net:
        """The network with branches, by the mechanism."""
        model = self.plain()
        self.attach_by(model, self.x)
        return model

    def hand(self, seed: int | None = None) -> Net:
        """The network with branches, written by hand."""
        model = _net(HandBlock, self.seed if seed is None else seed)
        freeze_but_branches(model)
        return model

    def wanted(self) -> Values:
        """What the network written by hand gives."""
        return self.run(self.hand())

    def run(self, model: nn.Module, x: Tensor | None = None) -> Values:
        """Output and gradients of a model."""
        out = model(self.x if x is None else x)
        return out, list(torch.autograd.grad(loss(out), trained(model)))


def _net(block: type[Block], seed: int) -> Net:
    """The network with values that leave no part of it blank; a hand-written one has the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(block).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and "branch" not in name:
                    low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.5, 0.5)
                    tensor.uniform_(low, high)
    return model


def loss(out: Tensor) -> Tensor:
    """A number whose gradient depends on the output."""
    return F.softplus(out).sum()


def grads(model: nn.Module) -> list[Tensor]:
    """The accumulated gradients of the factors."""
    return [p.grad for p in trained(model) if p.grad is not None]


def double(model: nn.Module) -> None:
    """Double every factor."""
    with torch.no_grad():
        for factor in trained(model):
            factor.mul_(2)


def assert_same(found: Values, wanted: Values) -> None:
    """Outputs and gradients agree; a diagonal is flat where a factor is (C, 1, 1)."""
    assert_close(found[0], wanted[0])
    for a, b in zip(found[1], wanted[1], strict=True):
        assert_close(a, b.reshape(a.shape))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Two tensors agree to ``RTOL`` and ``ATOL``."""
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=RTOL, atol=ATOL):
        raise AssertionError(_apart(found, wanted))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Two tensors agree to ``ROUGH`` of the largest value."""
    if not float((found - wanted).abs().max()) <= ROUGH * float(wanted.abs().max()):
        raise AssertionError(_apart(found, wanted))


def _apart(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"shape {tuple(found.shape)} in place of {tuple(wanted.shape)}"
    return f"values differ by {float((found - wanted).abs().max()):.2g} of {float(wanted.abs().max()):.2g}"


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """The compiler without memory of other models, and with a cache folder of its own.

    A compilation that was killed leaves a broken library in the common folder, on which later ones fail.
    """
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
            torch.compiler.reset()


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    if dist.is_initialized():
        yield
        return
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
