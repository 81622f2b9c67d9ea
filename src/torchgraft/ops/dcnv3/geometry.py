"""Where DCNv3 samples: the arguments of the operator, checked, and the positions that follow from them.

Equation of :mod:`.reference`; the order of the points is that of the published weights: the x of the kernel is the
outer index, and the centre may be missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import GraftError


class Geometry(NamedTuple):
    """Kernel, stride, padding and dilation as (y, x), and what else fixes the positions.

    Attributes:
        kernel: Size of the regular grid.
        stride: Steps between outputs, in pixels.
        padding: Zeros around the image, in pixels.
        dilation: Pixels between neighbours of the regular grid.
        groups: Groups of channels that share offsets and weights.
        offset_scale: Factor of the regular grid and of the offsets around its centre.
        remove_center: Whether the point in the middle is left out.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool

    @classmethod
    def of(
        cls,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        offset_scale: float,
        remove_center: bool,
    ) -> Geometry:
        """The arguments of the operator, checked.

        Raises:
            GraftError: A value is out of its range.
        """
        kernel = _pair("kernel_size", kernel_size, 1)
        if remove_center and (kernel[0] != kernel[1] or kernel[0] % 2 == 0):
            raise GraftError(f"dcnv3: remove_center needs an odd square kernel, kernel_size is {list(kernel)}")
        if groups < 1:
            raise GraftError(f"dcnv3: groups is {groups}; it must be at least 1")
        steps = _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
        return cls(kernel, *steps, groups, offset_scale, remove_center)

    @property
    def points(self) -> int:
        """P, the points that one output pixel samples in a group."""
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def grid(self) -> list[tuple[int, int]]:
        """(y, x) of the P points around the centre of the regular grid, before ``offset_scale``."""
        (rows, columns), (centre_y, centre_x) = self.kernel, self.centre
        grid = [
            (j * self.dilation[0] - centre_y, i * self.dilation[1] - centre_x)
            for i in range(columns)
            for j in range(rows)
        ]
        if self.remove_center:
            del grid[len(grid) // 2]
        return grid

    @property
    def centre(self) -> tuple[int, int]:
        """(y, x) from the first point of the regular grid to its centre; rounded down where there is none."""
        return self.dilation[0] * (self.kernel[0] - 1) // 2, self.dilation[1] * (self.kernel[1] - 1) // 2

    @property
    def start(self) -> tuple[int, int]:
        """(y, x) of the centre of the grid at the first output."""
        return self.centre[0] - self.padding[0], self.centre[1] - self.padding[1]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        (kh, kw), (sy, sx), (py, px), (dy, dx) = self[:4]
        return (height + 2 * py - dy * (kh - 1) - 1) // sy + 1, (width + 2 * px - dx * (kw - 1) - 1) // sx + 1

    def origins(self, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(Ho,) and (Wo,): y and x of the centre of the grid in every row and every column of the output."""
        (rows, columns), (start_y, start_x) = self.size(height, width), self.start
        y = torch.arange(rows, dtype=like.dtype, device=like.device) * self.stride[0] + start_y
        x = torch.arange(columns, dtype=like.dtype, device=like.device) * self.stride[1] + start_x
        return y, x

    def check(self, x: Tensor, offset: Tensor, mask: Tensor) -> None:
        """Refuse tensors that do not fit.

        Raises:
            GraftError: Names what was given and what was expected.
        """
        for name, tensor in (("x", x), ("offset", offset), ("mask", mask)):
            if tensor.dim() != 4:
                raise GraftError(f"dcnv3: {name} has shape {list(tensor.shape)}; 4 dimensions, channels last, expected")
            if tensor.device != x.device:
                raise GraftError(f"dcnv3: {name} is on {tensor.device} and x on {x.device}; one device expected")
            if tensor.dtype not in _TYPES:
                expected = ", ".join(str(t).removeprefix("torch.") for t in _TYPES)
                raise GraftError(f"dcnv3: {name} is {tensor.dtype}; one of {expected} expected")
            if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
                raise GraftError(f"dcnv3: {name} is {tensor.dtype} and x {x.dtype}; float64 goes with float64 only")
        if torch.jit.is_tracing():
            return  # sizes are tensors of the trace then, and a comparison would make them constants
        n, height, width, channels = x.shape
        if channels % self.groups:
            raise GraftError(f"dcnv3: x has {channels} channels, which groups={self.groups} does not divide")
        out = self.size(height, width)
        if height < 1 or width < 1 or out[0] < 1 or out[1] < 1:
            raise GraftError(f"dcnv3: a map of {height} x {width} is too small for {self._named()}")
        for name, tensor, each in (("offset", offset, 2), ("mask", mask, 1)):
            wanted = (n, *out, self.groups * self.points * each)
            if tensor.shape != wanted:
                how = " * 2" if each == 2 else ""
                raise GraftError(
                    f"dcnv3: {name} has shape {list(tensor.shape)}, expected {list(wanted)}: (N, Ho, Wo, groups * "
                    f"points{how}) for x {list(x.shape)}, groups={self.groups}, {self.points} points, {self._named()}"
                )

    def _named(self) -> str:
        names = ("kernel_size", "stride", "padding", "dilation")
        return ", ".join(f"{name}={list(value)}" for name, value in zip(names, self[:4], strict=True))


_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _pair(name: str, value: int | Sequence[int], lowest: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or min(pair) < lowest:
        raise GraftError(f"dcnv3: {name} is {value}; an integer or a pair (y, x), at least {lowest}, expected")
    return pair[0], pair[1]
