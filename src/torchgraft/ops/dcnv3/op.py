"""The public function, and the operators ``torchgraft::dcnv3`` and ``torchgraft::dcnv3_backward`` behind it.

They are registered with PyTorch, so that ``torch.compile``, ``torch.export`` and TorchScript see one operator whatever
computes it, and know its shapes without running it. For the backward they keep x, offset and mask and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.jit.annotations import BroadcastingList2

from ...errors import GraftError
from . import backends
from .geometry import Geometry

_ARGUMENTS = (
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, float offset_scale, "
    "bool remove_center, bool softmax, str? backend"
)


def dcnv3(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: BroadcastingList2[int] = 3,  # type: ignore[assignment]
    stride: BroadcastingList2[int] = 1,  # type: ignore[assignment]
    padding: BroadcastingList2[int] = 1,  # type: ignore[assignment]
    dilation: BroadcastingList2[int] = 1,  # type: ignore[assignment]
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Deformable convolution of version 3: every output samples the map at P learned places per group and adds up.

    The equation is that of :mod:`torchgraft.ops.dcnv3.reference`. Types may differ among the tensors (the output has
    that of ``x``), and what is narrower than float32 is computed in float32, so the operator is ready for autocast.

    Args:
        x: (N, H, W, C), channels last.
        offset: (N, Ho, Wo, groups * P * 2), (dx, dy) in pixels for every point. Points count down the columns of the
            kernel: the point in row j and column i is ``i * rows + j``.
        mask: (N, Ho, Wo, groups * P), the weight of every point; logits if ``softmax``.
        kernel_size: Rows and columns of the regular grid, or one number for both; P is their product.
        stride: Pixels between outputs, (y, x) or one number.
        padding: Pixels around the image, as above.
        dilation: Pixels between points of the regular grid, as above.
        groups: Groups of channels, each with offsets and weights of its own.
        offset_scale: Factor of both the offsets and the regular grid.
        remove_center: Leave out the point in the middle; P is one less.
        softmax: Normalise ``mask`` over the P points first.
        backend: What computes it; default: :func:`torchgraft.ops.backend_in_use`.

    Returns:
        (N, Ho, Wo, C).

    Raises:
        GraftError: Shapes, types or devices do not fit, or the backend cannot run here.

    Source: "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions",
    arXiv:2211.05778.
    """
    if torch.jit.is_scripting():
        return torch.ops.torchgraft.dcnv3(
            x, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax,
            backend,
        )  # fmt: skip
    else:
        form = backends.form_in_use(backend)
        if form != "reference":
            _refuse_forward_mode(x, offset, mask)
        if form is None:
            return torch.ops.torchgraft.dcnv3(
                x, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax,
                backend,
            )  # fmt: skip
        geometry = Geometry.of(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center)
        geometry.check(x, offset, mask)
        return backends.form(form)(x, offset, mask, geometry, softmax)


def _read(arguments: tuple[Any, ...]) -> tuple[Geometry, bool, str | None]:
    return Geometry.of(*arguments[:7]), arguments[7], arguments[8]


def _forward(x: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
    geometry, softmax, backend = _read(arguments)
    geometry.check(x, offset, mask)
    if not x.numel():
        return _output(x, geometry)
    return backends.kernel(x.device.type, backend).forward(x, offset, mask, geometry, softmax)


def _fake_forward(x: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
    geometry, _, _ = _read(arguments)
    geometry.check(x, offset, mask)
    return _output(x, geometry)


def _output(x: Tensor, geometry: Geometry) -> Tensor:
    return x.new_empty(x.shape[0], *geometry.size(x.shape[1], x.shape[2]), x.shape[3])


def _backward(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    (geometry, softmax, backend), wanted = _read(arguments), arguments[-1]
    if not x.numel():
        return _gradients(x, offset, mask, wanted, torch.zeros_like)
    found = backends.kernel(x.device.type, backend).backward(grad, x, offset, mask, geometry, softmax, wanted)
    of_x, of_offset, of_mask = (x.new_empty(0) if t is None else t for t in found)
    return of_x, of_offset, of_mask


def _fake_backward(
    _grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, offset, mask, arguments[-1], torch.empty_like)


def _gradients(
    x: Tensor, offset: Tensor, mask: Tensor, wanted: Sequence[bool], make: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The three results of the backward; those that are not wanted are empty, because an operator returns tensors."""
    of_x, of_offset, of_mask = (
        make(t, memory_format=torch.contiguous_format) if want else x.new_empty(0)
        for t, want in zip((x, offset, mask), wanted, strict=True)
    )
    return of_x, of_offset, of_mask


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    found = torch.ops.torchgraft.dcnv3_backward(grad, *ctx.saved_tensors, *ctx.arguments, wanted)
    gradients = (t if want else None for t, want in zip(found, wanted, strict=True))
    return (*gradients, *(None for _ in ctx.arguments))


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """Registered operators, torchvision's as well as ours, drop tangents without a word."""
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        raise GraftError("dcnv3: only the reference has a forward-mode derivative; use backend='reference'")


def _refuse_twice(ctx: Any, *_: Tensor) -> None:
    raise GraftError("dcnv3: its kernels have no second derivative; use backend='reference'")


def _batched(operator: Any, tensors: int) -> Callable[..., Any]:
    """The rule of ``vmap``: what is mapped over becomes a part of the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        size = info.batch_size
        folded = [
            t.unsqueeze(0).expand(size, *t.shape).flatten(0, 1) if dim is None else t.movedim(dim, 0).flatten(0, 1)
            for t, dim in zip(inputs[:tensors], in_dims, strict=False)
        ]
        out = operator(*folded, *inputs[tensors:])
        if isinstance(out, Tensor):
            return out.unflatten(0, (size, -1)), 0
        # A gradient that is not wanted has one dimension and no elements.
        return tuple(t.unflatten(0, (size, -1)) if t.dim() > 1 else t.expand(size, 0) for t in out), (0, 0, 0)

    return rule


def _register() -> None:
    tensors = "Tensor x, Tensor offset, Tensor mask"
    forward = torch.library.custom_op(
        "torchgraft::dcnv3", _forward, mutates_args=(), schema=f"({tensors}, {_ARGUMENTS}) -> Tensor"
    )
    backward = torch.library.custom_op(
        "torchgraft::dcnv3_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor grad, {tensors}, {_ARGUMENTS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(_differentiate, setup_context=_keep)
    backward.register_autograd(_refuse_twice)
    forward.register_vmap(_batched(torch.ops.torchgraft.dcnv3, 3))
    backward.register_vmap(_batched(torch.ops.torchgraft.dcnv3_backward, 4))


_register()
