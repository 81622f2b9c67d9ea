"""What PyTorch keeps of a frozen layer for the backward, what is needed, and what torchgraft keeps.

Every layer is frozen and its input wants a gradient, as behind a trainable module. The table is that of the torch that
is installed, so it tells when a later one no longer keeps the input of a frozen convolution (pytorch/pytorch issue
133566).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import attach
from ..core.anatomy import Anatomy
from ..core.method import Method
from ..core.placements import Placement, Point, Sequential
from ..lean.meter import saved_bytes
from .floor import floor
from .goals import Goal

CHANNELS, SIDE, BATCH = 64, 16, 2
MAPS, TOKENS = (BATCH, CHANNELS, SIDE, SIDE), (BATCH, SIDE * SIDE, CHANNELS)
TOLERANCE = 0.05
"""By how much of the bytes that are needed more may be kept."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of layer; bytes are relative to those of its input.

    Attributes:
        layer: The kind.
        plain: What PyTorch keeps.
        needed: What an exact backward needs.
        lean: What torchgraft keeps at level exact.
    """

    layer: str
    plain: float
    needed: float
    lean: float

    def goal(self) -> Goal:
        """The layer keeps what is needed."""
        return Goal(f"kept / input, {self.layer}", self.lean, self.needed * (1 + TOLERANCE) + 1e-3)


class _Permuted(nn.Module):
    """A linear layer on a map with its channels second, which is no contiguous matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1))


class _Attention(nn.Module):
    """Fused attention of four heads on q, k and v in one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


class _Gate(nn.Module):
    """Squeeze and excitation without the layers between."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class _Scale(nn.Module):
    """LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((CHANNELS,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Chain(nn.Sequential):
    """Several layers that are one row."""


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2d 3x3": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), MAPS),
    "Conv2d 1x1": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 1), MAPS),
    "Conv2d depthwise": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), MAPS),
    "Conv2d stride 2": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, 2, padding=1), MAPS),
    "Conv2d reflect": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect"), MAPS),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2), MAPS),
    "Conv1d": (lambda: nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1), (BATCH, CHANNELS, SIDE * SIDE)),
    "Conv3d": (lambda: nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1), (1, CHANNELS, 4, 8, 8)),
    "Linear, tokens": (lambda: nn.Linear(CHANNELS, CHANNELS), TOKENS),
    "Linear, permuted map": (_Permuted, MAPS),
    "BatchNorm2d, eval": (lambda: nn.BatchNorm2d(CHANNELS), MAPS),
    "LayerNorm": (lambda: nn.LayerNorm(CHANNELS), TOKENS),
    "RMSNorm": (lambda: nn.RMSNorm(CHANNELS), TOKENS),
    "GroupNorm": (lambda: nn.GroupNorm(8, CHANNELS), MAPS),
    "ReLU": (nn.ReLU, MAPS),
    "ReLU, in place": (lambda: nn.ReLU(inplace=True), MAPS),
    "ReLU6": (nn.ReLU6, MAPS),
    "LeakyReLU": (nn.LeakyReLU, MAPS),
    "Hardsigmoid": (nn.Hardsigmoid, MAPS),
    "Hardswish": (nn.Hardswish, MAPS),
    "SiLU": (nn.SiLU, MAPS),
    "GELU": (nn.GELU, TOKENS),
    "Mish": (nn.Mish, MAPS),
    "Sigmoid": (nn.Sigmoid, MAPS),
    "Dropout, training": (lambda: nn.Dropout(0.1), TOKENS),
    "MaxPool2d 3x3, stride 2": (lambda: nn.MaxPool2d(3, 2, 1), MAPS),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), MAPS),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(1), MAPS),
    "Softmax": (lambda: nn.Softmax(-1), TOKENS),
    "attention, fused": (_Attention, (BATCH, SIDE * SIDE, 3 * CHANNELS)),
    "gate x * g(x)": (_Gate, MAPS),
    "LayerScale": (_Scale, TOKENS),
    "Conv2d, BatchNorm2d, ReLU": (
        lambda: _Chain(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()),
        MAPS,
    ),
    "LayerNorm, Linear, GELU": (
        lambda: _Chain(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS), nn.GELU()),
        TOKENS,
    ),
}
"""Kind of layer -> how it is made and the shape of its input."""


class _Shift(nn.Module):
    """Adds one trainable number: behind it a gradient is wanted, and it keeps nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift.to(x.dtype).expand_as(x)


@dataclasses.dataclass(frozen=True)
class _Shifted(Method):
    """The method of this benchmark: one trainable number in front of the layer."""

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """Behind the module that is named ``before``."""
        return [Sequential(_Shift(), Point("before", "output"))]


def measure(dtype: torch.dtype = torch.float32, device: str = "cpu", *, channels_last: bool = False) -> list[Row]:
    """Measure every kind of layer."""
    return [row(name, dtype, device, channels_last=channels_last) for name in LAYERS]


def row(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", *, channels_last: bool = False) -> Row:
    """Measure one kind of layer, one of ``LAYERS``."""
    make, shape = LAYERS[name]
    last = channels_last and len(shape) == 4
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(shape).to(device, dtype, memory_format=layout)

    def attached(lean: Any) -> nn.Module:
        model = nn.Sequential()
        model.add_module("before", nn.Identity())
        model.add_module("layer", make())
        model = model.to(device, dtype).to(memory_format=layout).eval()  # type: ignore[call-overload]
        attach(model, _Shifted(), lean=lean, dropout=True, example=((x,), {}))
        return model.train()

    plain, lean = attached(False), attached("exact")
    own = [*plain.parameters(), *plain.buffers(), *lean.parameters(), *lean.buffers(), x]
    size = x.numel() * x.itemsize
    return Row(
        name,
        saved_bytes(lambda: plain(x), own) / size,
        floor(plain, ((x,), {})).bytes / size,
        saved_bytes(lambda: lean(x), own) / size,
    )
