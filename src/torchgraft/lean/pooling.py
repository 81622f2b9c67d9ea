"""Max-pool indices and dropout masks in the few bits that they carry.

PyTorch keeps an int64 for every output of a max pool, its place in the whole input plane, although it lies inside a
window of, say, nine places: 4 bits say which (8 bits up to 256 places, 32 beyond). Of dropout it keeps, on the CPU, a
float per element that is either 0 or ``1 / (1 - p)``, and a byte on other devices: 1 bit says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .masks import Bits, dense_stride, engine, memory_order
from .saved import Layout, Packed, keep


def pack_dropout(t: Tensor, p: float, outer: Any) -> Packed:
    """What dropout keeps, as bits.

    Args:
        t: The noise of dropout on the CPU, 0 or ``1 / (1 - p)``, or the bool mask of other devices; any other tensor
            is kept as it is.
        p: Probability of zero, below 1.
        outer: The saved-tensor hooks that keep the bits; None for none.

    Returns:
        A packed tensor that unpacks to the very bits of ``t``.
    """
    if t.dtype == torch.bool:
        return Bits(t, (0.0, None), (1.0, 0.0), outer)
    if t.is_floating_point() and t.device.type in ("cpu", "meta"):
        # PyTorch divides in the tensor's type; so must we. A fake tensor has no values, and neither has its quotient.
        kept = 1.0 if engine(t) == "fake" else torch.ones((), dtype=t.dtype).div_(1.0 - p).item()
        return Bits(t, (0.0, None), (kept, 0.0), outer)
    return keep(t, outer)


def pack_indices(indices: Tensor, shape: torch.Size, pool: Any, outer: Any) -> Packed:
    """The indices of a max pool as places inside the window.

    Args:
        indices: (N, C, *out) or (C, *out) int64: the flat place of each maximum in its input plane. The indices of a
            1-d pool may have one more axis of extent 1 before the last.
        shape: The pool's input shape, (N, C, *space) or (C, *space).
        pool: The ``nn.MaxPool1d``, ``2d`` or ``3d``, which must pool that very input (a subclass may pad it first).
        outer: The saved-tensor hooks that keep the bytes; None for none.

    Returns:
        A packed tensor that unpacks to equal indices.
    """
    windows = _Windows(shape, pool)
    if math.prod(windows.extent) >= 2**31:  # the arithmetic below is in 32 bits
        return keep(indices, outer)
    return _Indices(indices, windows, outer)


class _Windows:
    """The windows of a max pool over planes of a given extent."""

    __slots__ = ("dilation", "extent", "kernel", "padding", "stride")

    def __init__(self, shape: torch.Size, pool: Any) -> None:
        axes = next(n for n, kind in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1) if isinstance(pool, kind))
        self.extent = tuple(shape[-axes:])
        self.kernel, self.stride, self.padding, self.dilation = (
            (value,) * axes if isinstance(value, int) else tuple(value)
            for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        )

    def taps(self, indices: Tensor) -> Tensor:
        """The number of each index within its window, counted row by row; int32, of the indices' shape."""
        rest, taps, weight = indices.int(), None, 1
        for axis, start in self._starts(indices):
            place = rest
            if axis:
                rest = rest // self.extent[axis]
                place = place - rest * self.extent[axis]
            digit = place - start
            if self.dilation[axis] > 1:
                digit = digit // self.dilation[axis]
            taps = digit if taps is None else taps + digit * weight
            weight *= self.kernel[axis]
        assert taps is not None
        return taps

    def indices(self, taps: Tensor) -> Tensor:
        """The inverse of :meth:`taps`; int64."""
        indices, weight = torch.zeros((), dtype=torch.int32, device=taps.device), 1
        for axis, start in self._starts(taps):
            digit = taps
            if axis:
                taps = taps // self.kernel[axis]
                digit = digit - taps * self.kernel[axis]
            indices = (start + digit * self.dilation[axis]) * weight + indices
            weight *= self.extent[axis]
        return indices.long()

    def _starts(self, out: Tensor) -> Iterator[tuple[int, Tensor]]:
        """From the last axis to the first: its number, and where each window begins, to be broadcast to ``out``."""
        for axis in reversed(range(len(self.extent))):
            after = len(self.extent) - axis - 1
            window = torch.arange(out.shape[-1 - after], dtype=torch.int32, device=out.device)
            yield axis, (window * self.stride[axis] - self.padding[axis]).view(-1, *(1,) * after)


class _Indices:
    """Packed indices: the fewest bytes that hold a place in the window."""

    __slots__ = ("layout", "places", "windows")

    def __init__(self, indices: Tensor, windows: _Windows, outer: Any) -> None:
        self.layout, self.windows = Layout(indices), windows
        count = math.prod(windows.kernel)
        if count > 256:
            places = memory_order(indices).int()
        else:
            places = memory_order(windows.taps(indices)).to(torch.uint8)
            if count <= 16:
                pairs = F.pad(places, (0, places.numel() % 2)).view(-1, 2)
                places = pairs[:, 0] << 4 | pairs[:, 1]
        self.places = keep(places, outer)

    def unpack(self) -> Tensor:
        """The indices."""
        places, count = self.places.unpack(), math.prod(self.windows.kernel)
        if count <= 16:
            places = torch.stack((places >> 4, places & 15), 1).view(-1)
        shape = self.layout.shape
        places = places.as_strided(shape, dense_stride(shape, self.layout.stride))
        return places.long() if count > 256 else self.windows.indices(places.int())
