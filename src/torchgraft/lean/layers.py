"""Frozen layers that keep for the backward what the mathematics asks for.

Each is swapped in front of a layer of the backbone and runs that layer's own forward, so the numbers are PyTorch's and
so is the backward; only what is kept in between differs (:mod:`torchgraft.lean.saved`). The layers look at the size and
the kind of a tensor that is to be kept, never at its address: under autocast and under wrappers the weight that an
operator sees is a copy.

A module whose own weight the active adapter changes or trains has ``_lean_off`` set, and runs as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .compiled import can_drop_input, frozen_batch_norm, frozen_conv
from .hooks import acts
from .masks import Bits, engine, masked_gradient, pack_inside, unpack_inside
from .pooling import pack_dropout, pack_indices
from .saved import (
    Layout,
    Packed,
    Reference,
    autocasts,
    derive,
    keep,
    keep_or_derive,
    origin_of,
    outer_hooks,
    pop,
    push,
    unpack,
)

_EXPANDS = 2
"""Where products may be computed twice, an output of so many times the input's elements is made again from it."""


class Lean:
    """Base of all lean layers: innermost of what is swapped into a module."""

    swap_rank = 8
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]
    _modules: dict[str, Any]

    def _acts(self, x: Any) -> bool:
        return acts(x) and "_lean_off" not in self.__dict__

    def _read(self) -> tuple[Tensor, ...]:
        """What the layer's forward reads besides its input."""
        return tuple(t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None)

    def _frozen(self, name: str = "weight") -> Any:
        """A parameter that is there and not trained; None otherwise."""
        held = self._parameters.get(name)
        return None if held is None or held.requires_grad else held


class CastWeight:
    """A frozen weight in another type (autocast's copy): cast again in place of being kept."""

    __slots__ = ("dtype", "offset", "shape", "stride", "weight", "whole")

    def __init__(self, t: Tensor, weight: Tensor) -> None:
        self.weight, self.dtype, self.shape, self.stride = weight, t.dtype, t.shape, t.stride()
        self.whole, self.offset = weight.shape == t.shape, t.storage_offset()

    def unpack(self) -> Tensor:
        """Cast the weight."""
        cast = self.weight.detach().to(self.dtype)
        if self.whole and cast.stride() == self.stride:
            return cast
        return cast.as_strided(self.shape, self.stride, self.offset)


def _kept_weight(t: Tensor, weight: Tensor, outer: Any, computed: bool = False) -> Packed:
    """What stands for ``t``: the weight, a view of it, a copy in another type, or what the layer ``computed`` of it."""
    storage = t.untyped_storage()
    if storage._cdata == weight.untyped_storage()._cdata:
        return Reference(t)
    copied = not computed and t.dtype != weight.dtype and storage.nbytes() == weight.numel() * t.element_size()
    if copied and weight.is_contiguous() and weight.dtype.itemsize > t.dtype.itemsize:
        return CastWeight(t, weight)
    return keep(t, outer)


class LeanConv(Lean):
    """A frozen convolution of any kind: its input is dropped."""

    computes_weight: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, *space) -> (N, C_out, *space')."""
        # First what costs least: in inference every call here is paid per layer.
        if not torch.is_grad_enabled() or not x.requires_grad:
            return super().forward(x)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return frozen_conv(self, x) if can_drop_input(self, x) else super().forward(x)  # type: ignore[misc]
        weight = self._frozen()
        if weight is None or not self._acts(x):
            return super().forward(x)  # type: ignore[misc]
        return self._remembering(x, weight, super().forward)  # type: ignore[misc]

    def _remembering(self, x: Tensor, weight: Tensor, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """The layer's ``forward`` under hooks."""
        outer = outer_hooks()

        def pack(t: Tensor) -> Packed:
            if t.dim() < weight.dim() or t.shape == weight.shape:
                return _kept_weight(t, weight, outer, self.computes_weight)
            return Layout(t)

        push(pack, unpack)
        try:
            out = forward(x, *args)
        finally:
            pop()
        if "_lean_again" in self.__dict__ and _EXPANDS * x.numel() <= out.numel() and not args:
            derive(out, forward, x, self._read())
        return out


class LeanStdConv(LeanConv):
    """One that standardises its weight in every forward; that weight is kept."""

    computes_weight: ClassVar[bool] = True


class LeanConvTransposed(LeanConv):
    """A frozen transposed convolution."""

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """(N, C_in, *space) -> (N, C_out, *space')."""
        weight = self._frozen()
        if weight is None or not self._acts(x):
            return super(LeanConv, self).forward(x, output_size)  # type: ignore[misc]
        return self._remembering(x, weight, super(LeanConv, self).forward, output_size)  # type: ignore[misc]


class LeanLinear(Lean):
    """A frozen linear layer: keeps no copy of its weight in autocast's type."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        weight = self._frozen()
        if weight is None or not self._acts(x):
            return super().forward(x)  # type: ignore[misc]
        if not autocasts(x.device.type):
            return super().forward(x)  # type: ignore[misc]

        outer = outer_hooks()

        def pack(t: Tensor) -> Packed:
            return _kept_weight(t, weight, outer)

        push(pack, unpack)
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            pop()


class LeanBatchNorm(Lean):
    """A BatchNorm in eval mode, timm's with an activation included: its input is dropped."""

    training: bool

    def _trained(self) -> bool:
        weight = self._parameters.get("weight")
        return weight is not None and weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *space) -> (N, C, *space)."""
        if not torch.is_grad_enabled() or self.training or self._buffers.get("running_mean") is None or self._trained():
            return super().forward(x)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            if self.__dict__.get("_lean_plain") and "_lean_off" not in self.__dict__:
                return frozen_batch_norm(self, x)
            return super().forward(x)  # type: ignore[misc]
        if not self._acts(x):
            return super().forward(x)  # type: ignore[misc]
        storage, shape = x.untyped_storage()._cdata, x.shape

        def pack(t: Tensor) -> Packed:
            # Only the norm's input: an activation inside the layer keeps a tensor of the same shape.
            dropped = t.shape == shape and t.untyped_storage()._cdata == storage
            return Layout(t) if dropped else keep_or_derive(t, outer)

        outer = outer_hooks()
        push(pack, unpack)
        try:
            out = super().forward(x)  # type: ignore[misc]
        finally:
            pop()
        if origin_of(x) is not None:
            derive(out, super().forward, x, self._read())  # type: ignore[misc]
        return out


class Sloped(Lean):
    """An activation with two constant slopes: one bit an element is kept."""

    nan_passes: ClassVar[bool] = False

    def _interval(self) -> tuple[float, float | None]:
        """Between which values the slope is the one of the bits that are set."""
        return 0.0, None

    def _stand_ins(self) -> tuple[float, float]:
        """A value inside and one outside that interval."""
        return 1.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if not self._acts(x):
            return super().forward(x)  # type: ignore[misc]
        outer = outer_hooks()

        def pack(t: Tensor) -> Packed:
            return Bits(t, self._interval(), self._stand_ins(), outer, nan=self.nan_passes)

        push(pack, unpack)
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            pop()


class LeanReLU(Sloped):
    """ReLU: the gradient passes where the output is positive, or not a number."""

    nan_passes: ClassVar[bool] = True
    inplace: bool

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if self._acts(x) and fuses(x) and not x._is_view():
            return _MaskedReLU.apply(x, self.inplace)  # type: ignore[no-any-return]
        return super().forward(x)


def fuses(x: Tensor) -> bool:
    """Whether there is a kernel that applies the bits to a gradient as it reads them."""
    return engine(x) == "triton" and torch.autograd.forward_ad._current_level < 0  # forward mode needs the operator


class _MaskedReLU(torch.autograd.Function):
    """ReLU whose backward reads the gradient and the bits, and writes no mask in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        out = torch.relu_(x) if inplace else torch.relu(x)
        if inplace:
            ctx.mark_dirty(out)
        ctx.layout = Layout(out)
        ctx.save_for_backward(pack_inside(out, 0.0, nan=True))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (bits,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this is wanted, too
            return grads[0] * unpack_inside(bits, ctx.layout), None
        return masked_gradient(bits, grads[0], ctx.layout), None


class LeanLeakyReLU(Sloped):
    """LeakyReLU: the slope depends on the sign of the input."""

    def _stand_ins(self) -> tuple[float, float]:
        return 1.0, -1.0


class LeanHardtanh(Sloped):
    """Hardtanh and ReLU6: the gradient passes between the two limits."""

    min_val: float
    max_val: float

    def _interval(self) -> tuple[float, float | None]:
        return self.min_val, self.max_val

    def _stand_ins(self) -> tuple[float, float]:
        # The limit itself may be rounded to a value inside.
        return (self.min_val + self.max_val) / 2, -math.inf


class LeanHardsigmoid(Sloped):
    """Hardsigmoid: the gradient passes between -3 and 3."""

    def _interval(self) -> tuple[float, float | None]:
        return -3.0, 3.0

    def _stand_ins(self) -> tuple[float, float]:
        return 0.0, 3.0


class LeanAvgPool(Lean):
    """Average pooling: its backward reads the shape of the input only."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *space) -> (N, C, *space')."""
        if not self._acts(x):
            return super().forward(x)  # type: ignore[misc]
        push(Layout, unpack)
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            pop()


class LeanMaxPool(Lean):
    """Max pooling: the place of the maximum within its window is kept, in 4 or 8 bits."""

    def forward(self, x: Tensor) -> Any:
        """(N, C, *space) -> (N, C, *space')."""
        if not self._acts(x):
            return super().forward(x)  # type: ignore[misc]
        outer, shape = outer_hooks(), x.shape

        def pack(t: Tensor) -> Packed:
            return pack_indices(t, shape, self, outer) if t.dtype == torch.int64 else Layout(t)

        push(pack, unpack)
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            pop()


class LeanDropout(Lean):
    """Dropout that acts: one bit an element says what stayed."""

    p: float

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if not self._acts(x) or not 0.0 < self.p < 1.0:
            return super().forward(x)  # type: ignore[misc]
        outer = outer_hooks()
        push(lambda t: pack_dropout(t, self.p, outer), unpack)
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            pop()


class Elementwise(Lean):
    """A norm over channels or a smooth activation: keeps its input, and its output is known to follow from it.

    What keeps the output for a gradient of its own, such as a low-rank branch, then keeps a handle. The layer
    itself likewise keeps a handle where its input follows from something that is kept.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer."""
        if not self._acts(x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        outer, version = outer_hooks(), x._version
        origin, seen = x.untyped_storage()._cdata, False

        def pack(t: Tensor) -> Packed:
            nonlocal seen
            seen = seen or t.untyped_storage()._cdata == origin
            return keep_or_derive(t, outer)

        push(pack, unpack)
        try:
            out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        finally:
            pop()
        if seen and not args and not kwargs and x._version == version and isinstance(out, Tensor):
            derive(out, super().forward, x, self._read())  # type: ignore[misc]
        return out
