"""Shifted windows on a map: partition, mask and way back, for attention modules that do this inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_APART = -100.0
"""Score of two positions that only the cyclic shift made neighbours, as in the published Swin."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """How one map is cut into windows.

    Attributes:
        height: Of the map; likewise ``width``.
        size: Height and width of a window.
        shift: Cyclic shift in front of the partition; zero along an axis on which one window covers the map.
    """

    height: int
    width: int
    size: tuple[int, int]
    shift: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, size: Sequence[int], shift: Sequence[int]) -> Windows:
        """The windows of a map (B, H, W, C)."""
        h, w = x.shape[1:3]
        turned = [0 if s >= n else t for n, s, t in zip((h, w), size, shift, strict=True)]
        return cls(h, w, (size[0], size[1]), (turned[0], turned[1]))

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the map, padded to whole windows."""
        return self.height + -self.height % self.size[0], self.width + -self.width % self.size[1]

    def partition(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B * windows, size * size, C), image by image."""
        (h, w), (a, b) = self.padded, self.size
        x = F.pad(x, (0, 0, 0, w - self.width, 0, h - self.height))
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        return x.unflatten(2, (w // b, b)).unflatten(1, (h // a, a)).transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def reverse(self, windows: Tensor) -> Tensor:
        """Undo :meth:`partition`."""
        (h, w), (a, b) = self.padded, self.size
        x = windows.unflatten(0, (-1, h // a, w // b)).unflatten(3, (a, b))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(self.shift):
            x = torch.roll(x, self.shift, (1, 2))
        return x[:, : self.height, : self.width]

    def mask(self, x: Tensor) -> Tensor | None:
        """(windows, N, N) to be added to the scores; None without a shift. ``x`` tells type and device."""
        if not any(self.shift):
            return None
        rows, columns = (self._regions(i, x) for i in (0, 1))
        regions = (3 * rows[:, None] + columns[None, :])[None, :, :, None]
        (h, w), (a, b) = self.padded, self.size
        cut = regions.unflatten(2, (w // b, b)).unflatten(1, (h // a, a)).transpose(2, 3).reshape(-1, a * b)
        return torch.where(cut[:, None, :] == cut[:, :, None], 0.0, _APART).to(x.dtype)

    def _regions(self, axis: int, x: Tensor) -> Tensor:
        """0, 1 or 2 for every position along one axis: those of one region were neighbours before the shift."""
        length, size, shift = self.padded[axis], self.size[axis], self.shift[axis]
        place = torch.arange(length, device=x.device)
        if not shift:
            return torch.zeros_like(place)
        return (place >= length - size).long() + (place >= length - shift).long()
