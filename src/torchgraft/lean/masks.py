"""One bit per element: which elements of a tensor lie inside an open interval.

This is all that the backward of ReLU, ReLU6, Hardtanh, Hardsigmoid and LeakyReLU asks about the tensor that PyTorch
keeps whole for it, 1/32 of the bytes in fp32. Bits are kept in *memory order*, element 0 in the highest bit of byte 0
(the order of ``numpy.packbits``) and zeros behind the last element, so that channels_last costs no copy.

On the CPU numpy does the work: a comparison and ``packbits`` there cost about what one ReLU costs, where torch's
comparison alone costs several. On CUDA it is a Triton kernel. Elsewhere (ROCm, XPU, MPS, CUDA without Triton), for
tensor subclasses, and while ``torch.compile`` traces, the mask is a bool tensor of one byte per element.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .saved import Layout, keep

# Elements per step on the CPU: the comparison's bytes stay in the cache, and add little to the peak.
_CHUNK = 2**19

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Laid(Protocol):
    """How a tensor lies in memory: what is left of it when its values are dropped."""

    shape: Any
    stride: Any
    dtype: torch.dtype


def pack_inside(t: Tensor, low: float, high: float | None = None, *, nan: bool = False) -> Tensor:
    """The bits of ``low < t`` and ``t < high``.

    Args:
        t: A floating-point or bool tensor of any shape. Elements are taken in memory order where ``t`` is dense in some
            order of its axes, and in the order of its contiguous copy otherwise (expanded or sliced views).
        low: Lower bound, itself outside.
        high: Upper bound, itself outside; None for none.
        nan: Whether NaN counts as inside. ``threshold_backward`` (ReLU) passes the gradient where its input is NaN;
            ``hardtanh_backward``, ``hardsigmoid_backward`` and ``leaky_relu_backward`` take NaN for outside.

    Returns:
        uint8 of ``ceil(numel / 8)`` elements on ``t``'s device, or a bool tensor of ``t``'s shape where bits are not
        supported. Fake and meta tensors give an empty uint8 tensor of the right size.
    """
    way, t = engine(t), t.detach()
    if t.dtype == torch.bool:
        t = t.view(torch.uint8)
    if way == "bool":
        mask: Tensor = _inside(t, low, high)
        return mask | t.isnan() if nan else mask
    if way == "fake":
        return t.new_empty(((t.numel() + 7) // 8,), dtype=torch.uint8)
    flat = memory_order(t)
    if way == "triton":
        from . import masks_triton

        return masks_triton.pack(flat, low, high, nan)
    return torch.from_numpy(_pack_on_cpu(flat, low, high, nan))


def unpack_inside(bits: Tensor, like: Laid, inside: float = 1.0, outside: float = 0.0) -> Tensor:
    """A tensor that lies like the packed one, with ``inside`` where the bit is set and ``outside`` elsewhere.

    Args:
        bits: What :func:`pack_inside` gave.
        like: Shape, strides and dtype of the packed tensor.
        inside: Value for set bits, rounded to the dtype.
        outside: Value for the others; minus infinity is outside of every interval, while a bound itself such as 0.1
            may be rounded into it.

    Returns:
        A tensor of ``like``'s shape and dtype, with its strides if those are dense, contiguous otherwise.
    """
    if bits.dtype == torch.bool:
        # Two 0-d tensors: with plain numbers the result would have the default type.
        return torch.where(bits, bits.new_tensor(inside, dtype=like.dtype), bits.new_tensor(outside, dtype=like.dtype))
    stride = dense_stride(like.shape, like.stride)
    way = engine(bits)
    if way == "fake":
        return bits.new_empty_strided(like.shape, stride, dtype=like.dtype)
    if way == "triton":
        from . import masks_triton

        out = torch.empty_strided(like.shape, stride, dtype=like.dtype, device=bits.device)
        masks_triton.unpack(bits, out.view(torch.uint8) if like.dtype == torch.bool else out, inside, outside)
        return out
    values = torch.from_numpy(_eight_at_a_time(bits, _float_table(like.dtype, inside, outside)))
    return values.view(like.dtype).as_strided(like.shape, stride)


def masked_gradient(bits: Tensor, grad: Tensor, like: Laid) -> Tensor:
    """The gradient where the bit is set, zero elsewhere: the whole backward of ReLU and Hardtanh in one pass.

    Args:
        bits: What :func:`pack_inside` gave.
        grad: Gradient of the packed tensor's shape; any strides.
        like: Shape and strides of the packed tensor.

    Returns:
        A tensor of ``grad``'s shape and dtype that lies like the packed one.
    """
    if bits.dtype == torch.bool:
        return torch.where(bits, grad, grad.new_zeros(()))
    stride = dense_stride(like.shape, like.stride)
    way = engine(bits)
    if way == "fake":
        return grad.new_empty_strided(like.shape, stride)
    if grad.stride() != tuple(stride):
        grad = torch.empty_strided(like.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)
    if way == "triton":
        from . import masks_triton

        return masks_triton.masked_gradient(bits, grad)
    integer = _SIGNED[grad.element_size()]
    kept = _eight_at_a_time(bits, _integer_table(integer))[: grad.numel()]
    kept &= memory_order(grad.detach()).view(integer).numpy()
    return torch.from_numpy(kept).view(grad.dtype).as_strided(like.shape, stride)


def engine(t: Tensor) -> str:
    """Who packs and unpacks ``t``: ``"numpy"``, ``"triton"``, ``"fake"`` (no data, sizes only) or ``"bool"``."""
    if torch.compiler.is_compiling():
        return "bool"
    plain = type(t) is Tensor or type(t) is nn.Parameter
    if plain and t.is_cpu:
        return "numpy"
    if isinstance(t, FakeTensor) or t.is_meta:
        return "fake"
    return "triton" if plain and t.is_cuda and _has_triton() else "bool"


class Bits:
    """A packed tensor of which the backward asks only where it lies inside an interval.

    Args:
        t: The tensor.
        interval: The two bounds; the second may be None.
        stand_ins: What it unpacks to inside and outside.
        outer: The saved-tensor hooks that keep the bits; None for none.
        nan: Whether NaN counts as inside.
    """

    __slots__ = ("bits", "layout", "stand_ins")

    def __init__(
        self,
        t: Tensor,
        interval: tuple[float, float | None],
        stand_ins: tuple[float, float],
        outer: Any,
        *,
        nan: bool = False,
    ) -> None:
        self.layout, self.stand_ins = Layout(t), stand_ins
        self.bits = keep(pack_inside(t, *interval, nan=nan), outer)

    def unpack(self) -> Tensor:
        """A tensor that is inside and outside at the same places."""
        return unpack_inside(self.bits.unpack(), self.layout, *self.stand_ins)


def memory_order(t: Tensor) -> Tensor:
    """The elements as a 1-d tensor, in memory order where ``t`` is dense; those of a contiguous copy otherwise."""
    if not t.is_contiguous() and not is_dense(t.shape, t.stride()):
        t = t.contiguous()
    return t.as_strided((t.numel(),), (1,))


def dense_stride(shape: Sequence[int], stride: Sequence[int]) -> Sequence[int]:
    """The strides that :func:`memory_order` stands for: ``stride`` itself if dense, the contiguous ones otherwise."""
    if is_dense(shape, stride):
        return stride
    steps = [1]
    for extent in reversed(shape[1:]):
        steps.append(steps[-1] * max(extent, 1))
    return tuple(reversed(steps))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill one stretch of memory, each place once, in some order of the axes."""
    expected = 1
    for step, extent in sorted(zip(stride, shape, strict=True)):
        if extent != 1:
            if step != expected:
                return extent == 0 or 0 in shape
            expected *= extent
    return True


@functools.cache
def _has_triton() -> bool:
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


def _inside(x: Any, low: float, high: float | None) -> Any:
    """The mask of a torch tensor or a numpy array; NaN is outside."""
    mask = x > low
    if high is not None:
        mask &= x < high
    return mask


def _outside(x: np.ndarray, low: float, high: float | None) -> np.ndarray:
    """The mask of the elements at or beyond a bound; NaN is not outside."""
    mask = x <= low
    if high is not None:
        mask |= x >= high
    return mask


def _pack_on_cpu(flat: Tensor, low: float, high: float | None, nan: bool) -> np.ndarray:
    n = flat.numel()
    if n <= _CHUNK:
        return _pack_chunk(flat, low, high, nan)
    bits = np.empty((n + 7) // 8, np.uint8)
    for start in range(0, n, _CHUNK):
        chunk = _pack_chunk(flat[start : start + _CHUNK], low, high, nan)
        bits[start // 8 : start // 8 + len(chunk)] = chunk
    return bits


def _pack_chunk(flat: Tensor, low: float, high: float | None, nan: bool) -> np.ndarray:
    # numpy has no bf16 and a slow fp16; PyTorch, too, compares these in fp32.
    x = (flat.float() if flat.element_size() == 2 else flat).numpy()
    if not nan:
        return np.packbits(_inside(x, low, high))
    bits = np.packbits(_outside(x, low, high))
    np.invert(bits, out=bits)
    if len(x) % 8:
        bits[-1] &= 0xFF << (8 - len(x) % 8) & 0xFF
    return bits


def _eight_at_a_time(bits: Tensor, table: np.ndarray) -> np.ndarray:
    """The table's rows of eight for every byte, in one row; as fast as ``unpackbits`` alone, and any two values."""
    return table.take(bits.numpy(), axis=0).reshape(-1)


@functools.lru_cache(maxsize=64)
def _float_table(dtype: torch.dtype, inside: float, outside: float) -> np.ndarray:
    """(256, 8): the eight values that each byte stands for, as integers of the same bits (numpy has no bf16)."""
    return torch.tensor([outside, inside], dtype=dtype).view(_SIGNED[dtype.itemsize]).numpy()[_bits_of_bytes()]


@functools.cache
def _integer_table(dtype: torch.dtype) -> np.ndarray:
    """(256, 8): all ones where the bit is set, all zeros elsewhere."""
    return torch.tensor([0, -1], dtype=dtype).numpy()[_bits_of_bytes()]


def _bits_of_bytes() -> np.ndarray:
    return np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
