"""Bounded error for fewer bytes: derivatives in 8 bits, inputs of trained layers in 8 bits a channel.

Two kinds of tensors are kept for the backward. *Signal* tensors (the input of a GELU) shape the gradient of everything
below; of those the derivative itself is kept, in 256 steps, with an error of at most half a step. *Parameter-only*
tensors (the input of a trained convolution) touch nothing but that layer's own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layers import Elementwise, Lean
from .saved import Packed, Reference, keep, origin_of, outer_hooks, pop, push, unpack

_RANGE = (-0.51, 1.51)
"""Holds the derivatives of all activations below: Hardswish reaches from -0.5 to 1.5."""
_RANGES = {"GELU": (-0.13, 1.13), "SiLU": (-0.10, 1.10), "Mish": (-0.12, 1.10)}
"""Class name -> a narrower range, for finer steps: GELU's derivative lies within -0.129 and 1.129."""


class CompactSmooth(Elementwise):
    """A smooth activation: its derivative is kept in 8 bits, or nothing where its input follows from a kept one."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if not self._acts(x) or origin_of(x) is not None:
            return super().forward(x)
        name = next((n for n in _RANGES if n in type(self).__name__), "")
        native = super(Elementwise, self).forward  # type: ignore[misc]
        return _Smooth.apply(x, native, *_RANGES.get(name, _RANGE))  # type: ignore[no-any-return]


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, low: float, high: float) -> Tensor:
        # This graph is gone in a moment: hooks outside that count or move what is kept must not see it.
        push(Reference, unpack)
        try:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                out = function(leaf * 1 if getattr(function.__self__, "inplace", False) else leaf)
                (slope,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        finally:
            pop()
        ctx.low, ctx.step = low, (high - low) / 255
        ctx.save_for_backward(slope.sub_(low).div_(ctx.step).round_().clamp_(0, 255).to(torch.uint8))
        return out.detach()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (steps,) = ctx.saved_tensors
        return grads[0] * steps.to(grads[0].dtype).mul_(ctx.step).add_(ctx.low), None, None, None


class CompactInput(Lean):
    """A trained convolution or linear layer: its input is kept in 8 bits with a scale per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        weight = self._parameters.get("weight")
        if torch.compiler.is_compiling() or (not self._acts(x) and not _trains(weight)) or weight is None:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        outer, storage = outer_hooks(), x.untyped_storage()._cdata
        axis = 1 if weight.dim() > 2 else -1

        def pack(t: Tensor) -> Packed:
            own = t.untyped_storage()._cdata == storage and t.is_floating_point() and t.dim() > 1
            if own and t.shape != weight.shape:
                return Int8(t, axis if t.dim() == x.dim() else -1, outer)
            return Reference(t) if t.shape == weight.shape else keep(t, outer)

        push(pack, unpack)
        try:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        finally:
            pop()


def _trains(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad and torch.is_grad_enabled()


class Int8:
    """A tensor in 8 bits, with one scale for every channel."""

    __slots__ = ("dtype", "scale", "steps")

    def __init__(self, t: Tensor, axis: int, outer: Any) -> None:
        t = t.detach()
        others = [d for d in range(t.dim()) if d != axis % t.dim()]
        scale = t.abs().amax(others, keepdim=True).float().div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        self.dtype, self.scale = t.dtype, keep(scale, outer)
        self.steps = keep((t / scale).round_().clamp_(-127, 127).to(torch.int8), outer)

    def unpack(self) -> Tensor:
        """Steps times scale."""
        return (self.steps.unpack() * self.scale.unpack()).to(self.dtype)
