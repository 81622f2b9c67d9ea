"""DCNv3 on CUDA, by Triton: forward and backward in one launch each, nothing but inputs is kept.

Equation of :mod:`.reference`. A program takes a block of output pixels of one group of one image as a tile of
(pixels, channels). Positions, weights and the softmax are computed once per pixel and point, whatever the number of
channels; a corner of the bilinear cell is one masked gather of rows. The backward gathers again: gradients of the
offsets and the mask are sums over the tile's channels and belong to one program, those of x are added atomically in
float32 and left out where they are not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Geometry
from .reference import accumulation_type

_TILE = 2048
"""Elements of a tile of (pixels, channels): 16 for each of 128 threads."""


def forward(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """The output, (N, Ho, Wo, C); arguments as of :func:`.reference.dcnv3`."""
    out = x.new_empty(x.shape[0], *geometry.size(*x.shape[1:3]), x.shape[3])
    tensors = [t.contiguous() for t in (x, offset, mask)]
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensor's
        _forward[_grid(out, geometry)](*tensors, out, *_numbers(x, out, geometry), **_constants(x, geometry, softmax))
    return out


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, offset and mask that are wanted; arguments as of :func:`.frugal.backward`."""
    tensors = [t.contiguous() for t in (x, offset, mask, grad)]
    of_x = torch.zeros(x.shape, dtype=accumulation_type(x), device=x.device) if wanted[0] else None
    of_offset = torch.empty(offset.shape, dtype=offset.dtype, device=x.device) if wanted[1] else None
    of_mask = torch.empty(mask.shape, dtype=mask.dtype, device=x.device) if wanted[2] else None
    with torch.cuda.device_of(x):
        _backward[_grid(grad, geometry)](
            *tensors, of_x, of_offset, of_mask, *_numbers(x, grad, geometry), **_constants(x, geometry, softmax)
        )
    return None if of_x is None else of_x.to(x.dtype), of_offset, of_mask


def _grid(out: Tensor, geometry: Geometry) -> tuple[int, int, int]:
    n, height, width, channels = out.shape
    return triton.cdiv(height * width, _block(channels // geometry.groups)[0]), geometry.groups, n


def _block(channels: int) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two."""
    wide = triton.next_power_of_2(channels)
    return max(1, min(128, _TILE // wide)), wide


def _numbers(x: Tensor, out: Tensor, geometry: Geometry) -> tuple[int, ...]:
    return x.shape[1], x.shape[2], out.shape[1] * out.shape[2], out.shape[2], geometry.groups


def _constants(x: Tensor, geometry: Geometry, softmax: bool) -> dict[str, Any]:
    channels = x.shape[3] // geometry.groups
    pixels, wide = _block(channels)
    return {
        "CHANNELS": channels,
        "ROWS": geometry.kernel[0],
        "POINTS": geometry.points,
        "REMOVED": geometry.points // 2 if geometry.remove_center else geometry.points,
        "STRIDE_Y": geometry.stride[0],
        "STRIDE_X": geometry.stride[1],
        "START_Y": geometry.start[0],
        "START_X": geometry.start[1],
        "DILATION_Y": geometry.dilation[0],
        "DILATION_X": geometry.dilation[1],
        "CENTRE_Y": geometry.centre[0],
        "CENTRE_X": geometry.centre[1],
        "SCALE": float(geometry.offset_scale),
        "SOFTMAX": softmax,
        "BLOCK": pixels,
        "WIDE": wide,
        "COLUMNS": triton.next_power_of_2(geometry.points),
    }


@triton.jit
def _highest_and_total(mask, place, POINTS: tl.constexpr, COLUMNS: tl.constexpr, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the logits of every pixel: the largest, and the sum of the exponentials of what they are below it."""
    column = tl.arange(0, COLUMNS)[None, :]
    logits = tl.load(mask + place[:, None] * POINTS + column, mask=column < POINTS, other=-float("inf")).to(kind)
    highest = tl.max(logits, axis=1)
    return highest, tl.sum(tl.exp(logits - highest[:, None]), axis=1)


@triton.jit
def _cell(position, size):  # type: ignore[no-untyped-def]
    """The integer below a coordinate and what is left; -2 and 0 for what lies outside, as for NaN."""
    position = tl.where((position >= -1) & (position < size), position, -2)
    low = tl.floor(position)
    return low.to(tl.int32), position - low


@triton.jit
def _locate(  # type: ignore[no-untyped-def]
    offset, mask, place, pixel, out_width, height, width, highest, total, scale, t, kind: tl.constexpr,
    ROWS: tl.constexpr, POINTS: tl.constexpr, REMOVED: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    START_Y: tl.constexpr, START_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    CENTRE_Y: tl.constexpr, CENTRE_X: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Weight of point t, the corner above left of its sample, and how far below and right of it the sample is."""
    point = tl.where(t >= REMOVED, t + 1, t)
    grid_y = (point % ROWS) * DILATION_Y - CENTRE_Y
    grid_x = (point // ROWS) * DILATION_X - CENTRE_X
    weight = tl.load(mask + place * POINTS + t).to(kind)
    if SOFTMAX:
        weight = tl.exp(weight - highest) / total
    shift_x = tl.load(offset + (place * POINTS + t) * 2).to(kind)
    shift_y = tl.load(offset + (place * POINTS + t) * 2 + 1).to(kind)
    origin_y = ((pixel // out_width) * STRIDE_Y + START_Y).to(kind)
    origin_x = ((pixel % out_width) * STRIDE_X + START_X).to(kind)
    y, part_y = _cell(origin_y + scale * (shift_y + grid_y), height)
    x, part_x = _cell(origin_x + scale * (shift_x + grid_x), width)
    return weight, y, x, part_y, part_x


@triton.jit
def _corner(y, x, height, width, channel, groups, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(BLOCK, WIDE): where the channels of a pixel are, from those of the image's first pixel; and whether they are."""
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = (y.to(tl.int64) * width + x) * (groups * CHANNELS)
    return at[:, None] + channel[None, :], inside[:, None] & (channel < CHANNELS)[None, :]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, offset, mask, out, height, width, pixels, out_width, groups,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, POINTS: tl.constexpr, REMOVED: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, START_Y: tl.constexpr, START_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, CENTRE_Y: tl.constexpr, CENTRE_X: tl.constexpr,
    SCALE: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    group, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    wanted = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixel = tl.minimum(wanted, pixels - 1)
    place = (image * pixels + pixel) * groups + group
    channel = tl.arange(0, WIDE)
    first = image * height * width * (groups * CHANNELS) + group * CHANNELS
    # A number that stands alone would be rounded to float32.
    scale = tl.full((1,), SCALE, kind)
    highest, total = scale, scale
    if SOFTMAX:
        highest, total = _highest_and_total(mask, place, POINTS, COLUMNS, kind)
    result = tl.zeros((BLOCK, WIDE), kind)
    for t in range(POINTS):  # not unrolled: that would be 36 gathers of code
        weight, y0, x0, part_y, part_x = _locate(
            offset, mask, place, pixel, out_width, height, width, highest, total, scale, t, kind, ROWS, POINTS, REMOVED,
            STRIDE_Y, STRIDE_X, START_Y, START_X, DILATION_Y, DILATION_X, CENTRE_Y, CENTRE_X, SOFTMAX,
        )  # fmt: skip
        for corner in tl.static_range(4):
            of_y = part_y if corner // 2 == 1 else 1 - part_y
            of_x = part_x if corner % 2 == 1 else 1 - part_x
            at, there = _corner(y0 + corner // 2, x0 + corner % 2, height, width, channel, groups, CHANNELS)
            value = tl.load(x + first + at, mask=there, other=0.0).to(kind)
            result += (weight * of_y * of_x)[:, None] * value
    to = place[:, None] * CHANNELS + channel[None, :]
    live = (wanted < pixels)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=live)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, offset, mask, grad, of_x, of_offset, of_mask, height, width, pixels, out_width, groups,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, POINTS: tl.constexpr, REMOVED: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, START_Y: tl.constexpr, START_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, CENTRE_Y: tl.constexpr, CENTRE_X: tl.constexpr,
    SCALE: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pointers of gradients that are not wanted are None."""
    kind: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    group, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    wanted = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixel = tl.minimum(wanted, pixels - 1)
    live = wanted < pixels
    place = (image * pixels + pixel) * groups + group
    channel = tl.arange(0, WIDE)
    first = image * height * width * (groups * CHANNELS) + group * CHANNELS
    scale = tl.full((1,), SCALE, kind)
    highest, total = scale, scale
    if SOFTMAX:
        highest, total = _highest_and_total(mask, place, POINTS, COLUMNS, kind)
    from_ = place[:, None] * CHANNELS + channel[None, :]
    given = tl.load(grad + from_, mask=live[:, None] & (channel < CHANNELS)[None, :], other=0.0).to(kind)
    column = tl.arange(0, COLUMNS)[None, :]
    of_weights = tl.zeros((BLOCK, COLUMNS), kind)
    for t in range(POINTS):  # not unrolled: that would be 36 gathers of code
        weight, y0, x0, part_y, part_x = _locate(
            offset, mask, place, pixel, out_width, height, width, highest, total, scale, t, kind, ROWS, POINTS, REMOVED,
            STRIDE_Y, STRIDE_X, START_Y, START_X, DILATION_Y, DILATION_X, CENTRE_Y, CENTRE_X, SOFTMAX,
        )  # fmt: skip
        if of_x is not None:
            for corner in tl.static_range(4):
                of_y = part_y if corner // 2 == 1 else 1 - part_y
                of_x_ = part_x if corner % 2 == 1 else 1 - part_x
                at, there = _corner(y0 + corner // 2, x0 + corner % 2, height, width, channel, groups, CHANNELS)
                part = (weight * of_y * of_x_)[:, None] * given
                tl.atomic_add(of_x + first + at, part, mask=there & live[:, None], sem="relaxed")
        if (of_offset is not None) or (of_mask is not None):
            at, there = _corner(y0, x0, height, width, channel, groups, CHANNELS)
            above = tl.load(x + first + at, mask=there, other=0.0).to(kind)
            at, there = _corner(y0, x0 + 1, height, width, channel, groups, CHANNELS)
            step_above = tl.load(x + first + at, mask=there, other=0.0).to(kind) - above
            at, there = _corner(y0 + 1, x0, height, width, channel, groups, CHANNELS)
            below = tl.load(x + first + at, mask=there, other=0.0).to(kind)
            at, there = _corner(y0 + 1, x0 + 1, height, width, channel, groups, CHANNELS)
            step_below = tl.load(x + first + at, mask=there, other=0.0).to(kind) - below
            value_above = above + part_x[:, None] * step_above
            step_down = below + part_x[:, None] * step_below - value_above
            if of_offset is not None:
                step_right = step_above + part_y[:, None] * (step_below - step_above)
                of_shift_x = scale * weight * tl.sum(given * step_right, axis=1)
                of_shift_y = scale * weight * tl.sum(given * step_down, axis=1)
                to = of_offset + (place * POINTS + t) * 2
                tl.store(to, of_shift_x.to(of_offset.dtype.element_ty), mask=live)
                tl.store(to + 1, of_shift_y.to(of_offset.dtype.element_ty), mask=live)
            if of_mask is not None:
                of_weight = tl.sum(given * (value_above + part_y[:, None] * step_down), axis=1)
                of_weights = tl.where(column == t, of_weight[:, None], of_weights)
    if of_mask is not None:
        if SOFTMAX:
            logits = tl.load(mask + place[:, None] * POINTS + column, mask=column < POINTS, other=-float("inf"))
            weights = tl.exp(logits.to(kind) - highest[:, None]) / total[:, None]
            of_weights = weights * (of_weights - tl.sum(weights * of_weights, axis=1)[:, None])
        to = of_mask + place[:, None] * POINTS + column
        tl.store(to, of_weights.to(of_mask.dtype.element_ty), mask=live[:, None] & (column < POINTS))
