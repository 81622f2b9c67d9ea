"""The bit masks of :mod:`.masks` on CUDA.

Every program takes ``BLOCK`` consecutive elements as a matrix of (bytes, 8 bits). A thread then holds the eight
neighbours of one byte: it reads and writes them with wide, coalesced accesses, and no threads need to talk. The order
of the bits is that of the CPU, so packed masks can be moved between devices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def pack(flat: Tensor, low: float, high: float | None, nan: bool) -> Tensor:
    """The bits of ``low < flat < high``; see :func:`torchgraft.lean.masks.pack_inside`.

    Args:
        flat: (n,) floats, contiguous.
        low: Lower bound.
        high: Upper bound or None.
        nan: Whether NaN counts as inside.

    Returns:
        (ceil(n / 8),) uint8.
    """
    n = flat.numel()
    bits = torch.empty((n + 7) // 8, dtype=torch.uint8, device=flat.device)
    if n:
        with _device_of(flat):
            _pack[(triton.cdiv(n, _BLOCK),)](flat, bits, n, float(low), high, nan, _BLOCK)
    return bits


def unpack(bits: Tensor, out: Tensor, inside: float, outside: float) -> Tensor:
    """Fill ``out``, dense in memory, with ``inside`` where the bit is set and ``outside`` elsewhere.

    Args:
        bits: (ceil(n / 8),) uint8.
        out: n elements of a floating-point type; written in memory order.
        inside: Value for set bits.
        outside: Value for the others.

    Returns:
        ``out``.
    """
    n = out.numel()
    if n:
        # Rounded to the type here, so that the kernel's casts are exact.
        values = torch.tensor([inside, outside], dtype=out.dtype).tolist()
        with _device_of(out):
            _unpack[(triton.cdiv(n, _BLOCK),)](bits, out, n, *values, _BLOCK)
    return out


def masked_gradient(bits: Tensor, grad: Tensor) -> Tensor:
    """The gradient where the bit is set and zero elsewhere, in one pass.

    Args:
        bits: (ceil(n / 8),) uint8.
        grad: n elements, dense in the memory order that the bits were packed in.

    Returns:
        A tensor of ``grad``'s shape, strides and type.
    """
    out = torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device=grad.device)
    n = grad.numel()
    if n:
        with _device_of(grad):
            _masked_gradient[(triton.cdiv(n, _BLOCK),)](bits, grad, out, n, _BLOCK)
    return out


def _device_of(t: Tensor) -> torch.cuda.device_of:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device_of(t)


@triton.jit
def _places(n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Indices of this program's bytes, (BLOCK / 8,), and of their elements, (BLOCK / 8, 8), in 64 bits."""
    rows = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    return rows, rows[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _bits_at(bits, rows, n):  # type: ignore[no-untyped-def]
    """(rows, 8) of 0 and 1; the first element of a byte is its highest bit."""
    byte = tl.load(bits + rows, mask=rows * 8 < n, other=0).to(tl.int32)
    return (byte[:, None] >> (7 - tl.arange(0, 8))[None, :]) & 1


@triton.jit
def _pack(x, bits, n, LOW: tl.constexpr, HIGH: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, at = _places(n, BLOCK)
    # PyTorch compares 16-bit floats in fp32. A number that stands alone would be rounded to fp32 for fp64, too.
    kind: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    value = tl.load(x + at, mask=at < n, other=0.0).to(kind)
    low = tl.full((1, 1), LOW, kind)
    inside = value > low
    if HIGH is not None:
        inside = inside & (value < tl.full((1, 1), HIGH, kind))
    if NAN:
        inside = inside | (value != value)
    inside = inside & (at < n)
    byte = tl.sum(inside.to(tl.int32) << (7 - tl.arange(0, 8))[None, :], axis=1)
    tl.store(bits + rows, byte.to(tl.uint8), mask=rows * 8 < n)


@triton.jit
def _unpack(bits, out, n, INSIDE: tl.constexpr, OUTSIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, at = _places(n, BLOCK)
    kind: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    inside, outside = tl.full((1, 1), INSIDE, kind), tl.full((1, 1), OUTSIDE, kind)
    value = tl.where(_bits_at(bits, rows, n) != 0, inside, outside)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _masked_gradient(bits, grad, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, at = _places(n, BLOCK)
    value = tl.load(grad + at, mask=at < n, other=0.0)
    # A choice, not a product: infinity times zero would be NaN.
    tl.store(out + at, tl.where(_bits_at(bits, rows, n) != 0, value, 0.0), mask=at < n)
