"""A BatchNorm in eval mode, computed in the weight of the convolution before it.

``scale * (W x + b) + shift = (scale * W) x + (scale * b + shift)``: one pass over the activations less, forward and
backward. The parameters stay what they are; the product is made where it is used, and again in the backward. That
pays where a map is larger than the weights, so small maps are left to the norm itself. It is done only where a backward
will follow, so that inference gives the very bits of the backbone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from ..swap import has_layer, original_class, swap, unswap
from .hooks import acts
from .saved import Layout, Packed, keep, outer_hooks, pop, push, unpack

_PAYS = 4
"""The output must have so many times the elements of the weight."""

_CONVS = {c.forward for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)}
_NORMS = {n.forward for n in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}
_forced = False


class Pair(NamedTuple):
    """Paths of a convolution and of the BatchNorm that reads its output."""

    conv: str
    norm: str


@dataclasses.dataclass
class _Bond:
    """What the two halves of a pair share; not a module, so that neither becomes a child of the other."""

    conv: Any
    norm: Any
    conv_paused: bool = False
    norm_paused: bool = False

    def holds(self, x: Tensor, elements: int) -> bool:
        """Whether the norm is folded in a forward whose convolution returns so many elements."""
        if self.conv_paused or self.norm_paused or self.norm.training:
            return False
        if not (acts(x) or _forced) or elements < _PAYS * self.conv._parameters["weight"].numel():
            return False
        held = (*self.conv._parameters.values(), *self.norm._parameters.values())
        return not any(p is not None and p.requires_grad for p in held)


class FoldsNorm:
    """In front of a convolution: computes the norm behind it, too."""

    swap_rank = 7

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C_in, *space) -> (N, C_out, *space'), normalised."""
        bond: _Bond = self.__dict__["_fold"]
        if not _may_fold() or not bond.holds(x, _elements(self, x)):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        weight, bias = _product(bond)
        if isinstance(self, Conv2dSame):
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        # Autograd holds on to the hook for as long as to what it packed, so the hook must not hold on to tensors.
        shape, other = weight.shape, x.shape != weight.shape
        drops = self.__dict__.get("_lean_plain") is not None

        def pack(t: Tensor) -> Packed:
            if t.shape == shape and other:
                return _Product(bond, t.dtype)
            return Layout(t) if drops and other else keep(t, outer)

        outer = outer_hooks()
        push(pack, unpack)
        try:
            return self._conv_forward(x, weight, bias)  # type: ignore[no-any-return, attr-defined]
        finally:
            pop()


class FoldedNorm:
    """In front of that norm: nothing is left to do but the activation that timm's norms include."""

    swap_rank = 7

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, *space) -> (N, C, *space)."""
        bond: _Bond = self.__dict__["_fold"]
        if not _may_fold() or not bond.holds(x, x.numel()):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return self.act(self.drop(x)) if isinstance(self, BatchNormAct2d) else x  # type: ignore[no-any-return]


class _Product:
    """The folded weight, to be made again."""

    __slots__ = ("bond", "dtype")

    def __init__(self, bond: _Bond, dtype: torch.dtype) -> None:
        self.bond, self.dtype = bond, dtype

    def unpack(self) -> Tensor:
        with torch.no_grad():
            return _product(self.bond)[0].to(self.dtype)


def foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the two are layers that can be folded, each by its class."""
    own_conv: Any = original_class(conv)
    own_norm: Any = original_class(norm)
    known = own_conv.forward in _CONVS and (own_norm.forward in _NORMS or own_norm.forward is BatchNormAct2d.forward)
    return known and norm.running_mean is not None and conv.out_channels == norm.num_features


def fold_norms(model: nn.Module, pairs: Iterable[Pair]) -> None:
    """Make exactly these pairs folded ones."""
    for module in model.modules():
        if "_fold" in module.__dict__:
            unswap(module, FoldsNorm)
            unswap(module, FoldedNorm)
            del module.__dict__["_fold"]
    for pair in pairs:
        conv, norm = model.get_submodule(pair.conv), model.get_submodule(pair.norm)
        bond = _Bond(conv, norm)
        for module, layer in ((conv, FoldsNorm), (norm, FoldedNorm)):
            module.__dict__["_fold"] = bond
            swap(module, layer)


def pause_fold(module: nn.Module, *, before: bool, after: bool) -> None:
    """Stop folding at a module where something acts between the convolution and the norm.

    Args:
        module: A convolution or a norm; others are left alone.
        before: Something acts in front of the module, or on its parameters.
        after: Something acts behind it, or on its parameters.
    """
    bond: _Bond | None = module.__dict__.get("_fold")
    if bond is None:
        return
    if has_layer(module, FoldsNorm):
        bond.conv_paused = after
    else:
        bond.norm_paused = before


@contextlib.contextmanager
def folding_always() -> Iterator[None]:
    """Fold in forwards without a backward too, to compare outputs."""
    global _forced
    _forced = True
    try:
        yield
    finally:
        _forced = False


def _may_fold() -> bool:
    """Whether anything is folded here at all; the cheap part of the question, for inference."""
    return (torch.is_grad_enabled() or _forced) and not torch.compiler.is_compiling()


def _elements(conv: Any, x: Tensor) -> int:
    """Elements of what ``conv`` returns for ``x``."""
    space = x.shape[-len(conv.kernel_size) :]
    sides = []
    for i, n in enumerate(space):
        kernel, stride, dilation = conv.kernel_size[i], conv.stride[i], conv.dilation[i]
        if isinstance(conv, Conv2dSame):
            sides.append(-(-n // stride))
        elif conv.padding == "same":
            sides.append(n)
        else:
            padding = 0 if isinstance(conv.padding, str) else conv.padding[i]
            sides.append((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    return math.prod(x.shape[: -len(space) - 1]) * conv.out_channels * math.prod(sides)


def _product(bond: _Bond) -> tuple[Tensor, Tensor]:
    """Weight and bias that do what convolution and norm do; computed in float32 at least."""
    conv, norm = bond.conv, bond.norm
    weight, bias = conv._parameters["weight"], conv._parameters.get("bias")
    exact = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(exact) + norm.eps)
    if norm._parameters["weight"] is not None:
        scale = scale * norm._parameters["weight"].to(exact)
    shift = -norm.running_mean.to(exact) * scale
    if norm._parameters["bias"] is not None:
        shift = shift + norm._parameters["bias"].to(exact)
    if bias is not None:
        shift = shift + bias.to(exact) * scale
    product = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return product.to(weight.dtype), shift.to(weight.dtype)
