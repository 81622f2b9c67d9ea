"""The same savings under ``torch.compile``, where saved-tensor hooks would break the graph.

An ``autograd.Function`` names what is kept, and the partitioner of the compiler keeps no more. Masks need no help: it
finds by itself that a comparison serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .saved import autocasts


class _FrozenConv(torch.autograd.Function):
    """A convolution with a frozen weight; of its input the shape is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conf: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.conf = x.shape, conf
        ctx.last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return torch.convolution(x, weight, bias, *conf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        (grad,) = grads
        layout = torch.channels_last if ctx.last else torch.contiguous_format
        # Only the shape and the layout of the input are read.
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        found = torch.ops.aten.convolution_backward(grad, x, weight, None, *ctx.conf, (True, False, False))
        return found[0], None, None, None


def can_drop_input(conv: Any, x: Tensor) -> bool:
    """Whether ``conv`` is one convolution of ``x`` with zero padding and frozen parameters, and has a backward."""
    held = conv.__dict__
    if not held.get("_lean_plain") or "_lean_off" in held:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or x.dim() != conv.weight.dim():
        return False
    trained = conv.weight.requires_grad or (conv.bias is not None and conv.bias.requires_grad)
    return torch.is_grad_enabled() and x.requires_grad and not trained


def frozen_conv(conv: Any, x: Tensor) -> Tensor:
    """The convolution ``conv`` of ``x``; see :func:`can_drop_input`."""
    conf = (conv.stride, conv.padding, conv.dilation, False, (0,) * len(conv.kernel_size), conv.groups)
    weight, bias = conv.weight, conv.bias
    if autocasts(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    return _FrozenConv.apply(x, weight, bias, conf)  # type: ignore[no-any-return]


def frozen_batch_norm(norm: Any, x: Tensor) -> Tensor:
    """A BatchNorm in eval mode as a product and a sum per channel, of which the backward needs the factor only."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean * factor
    shift = shift if norm.bias is None else shift + norm.bias
    shape = [1, -1] + [1] * (x.dim() - 2)
    return x * factor.view(shape).to(x.dtype) + shift.view(shape).to(x.dtype)
