"""Geometries, inputs, an explicit computation and comparisons, shared by the tests of DCNv3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchgraft.ops.dcnv3.geometry import Geometry


class Case(NamedTuple):
    """Arguments of the operator, channels of one group and the size of the map."""

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 2
    offset_scale: float = 1.0
    remove_center: bool = False
    channels: int = 4
    size: tuple[int, int] = (5, 6)

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(*self[:7])

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name not in ("channels", "size")}

    def inputs(self, n: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, offset and mask (logits); offsets reach outside, and no sample is near an integer coordinate."""
        random = torch.Generator().manual_seed(seed)
        g = self.geometry
        rows, columns = g.size(*self.size)
        x = torch.randn(n, *self.size, self.groups * self.channels, generator=random, dtype=torch.float64)
        whole = torch.randint(-3, 4, (n, rows, columns, self.groups, g.points, 2), generator=random)
        part = 0.05 + 0.9 * torch.rand(whole.shape, generator=random, dtype=torch.float64)
        grid = torch.tensor(g.grid, dtype=torch.float64).flip(-1)
        offset = ((whole + part) / g.offset_scale - grid).flatten(3)
        mask = torch.randn(n, rows, columns, self.groups * g.points, generator=random, dtype=torch.float64)
        return x.to(dtype), offset.to(dtype), mask.to(dtype)


CASES = {
    "plain": Case(),
    "scaled and strided": Case(stride=(2, 2), offset_scale=2.0, groups=3, channels=3, size=(7, 6)),
    "five by five": Case((5, 5), padding=(2, 2), groups=1, channels=16),
    "without the centre": Case(remove_center=True, offset_scale=1.5, channels=8),
    "without the centre of five by five": Case((5, 5), padding=(2, 2), remove_center=True, groups=1, channels=8),
    "even and dilated": Case((2, 2), padding=(0, 0), dilation=(2, 2), channels=32),
    "different in y and x": Case((3, 2), (2, 1), (0, 1), (1, 2), offset_scale=1.3, channels=5, size=(6, 7)),
    "one point": Case((1, 1), padding=(0, 0), groups=4, channels=1, size=(3, 1)),
    "many channels": Case(groups=1, channels=40, size=(4, 3)),
}


def explicit(x: Tensor, offset: Tensor, mask: Tensor, case: Case) -> Tensor:
    """The equation, number by number; ``mask`` holds weights."""
    n, height, width, _ = x.shape
    (rows, columns), groups, scale = case.kernel_size, case.groups, case.offset_scale
    centre = [d * (k - 1) // 2 for d, k in zip(case.dilation, case.kernel_size, strict=True)]
    points = [(i, j) for i in range(columns) for j in range(rows)]
    if case.remove_center:
        points.remove((columns // 2, rows // 2))
    maps = x.unflatten(-1, (groups, case.channels))
    out = x.new_zeros(n, *mask.shape[1:3], groups, case.channels)
    offsets, weights = offset.unflatten(-1, (groups, len(points), 2)), mask.unflatten(-1, (groups, len(points)))
    for b, h, w, g in torch.cartesian_prod(*(torch.arange(s) for s in out.shape[:4])).reshape(-1, 4).tolist():
        for t, (i, j) in enumerate(points):
            dx, dy = offsets[b, h, w, g, t].tolist()
            px = w * case.stride[1] - case.padding[1] + centre[1] + scale * (i * case.dilation[1] - centre[1] + dx)
            py = h * case.stride[0] - case.padding[0] + centre[0] + scale * (j * case.dilation[0] - centre[0] + dy)
            for y in (math.floor(py), math.floor(py) + 1):
                for x_ in (math.floor(px), math.floor(px) + 1):
                    if 0 <= y < height and 0 <= x_ < width:
                        part = (1 - abs(py - y)) * (1 - abs(px - x_))
                        out[b, h, w, g] += weights[b, h, w, g, t] * part * maps[b, y, x_, g]
    return out.flatten(3)


def gradients(y: Tensor, inputs: Sequence[Tensor], seed: int = 0) -> tuple[Tensor, ...]:
    """Of a fixed random weighting of the output."""
    given = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(y, inputs, given.to(y.dtype))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())
