"""When a lean layer acts, and the layer that lets whatever runs inside a module keep handles for copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .saved import Packed, keep_or_derive, outer_hooks, pop, push, unpack


def acts(x: Any) -> bool:
    """Whether autograd will keep something of an operator on ``x``, in plain eager mode.

    Not under functorch transforms and not while a graph is traced: there the native operator runs.
    """
    return torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad and _is_eager()


def traces_eagerly() -> bool:
    """Whether autograd records what runs, in plain eager mode."""
    return torch.is_grad_enabled() and _is_eager()


def _is_eager() -> bool:
    if torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and torch._C._get_tracing_state() is None


def watch() -> None:
    """From now on, until :func:`.saved.pop`, keep handles in place of copies where they serve."""
    outer = outer_hooks()

    def pack(t: Tensor) -> Packed:
        return keep_or_derive(t, outer)

    push(pack, unpack)


class Watched:
    """In front of a module that computes more than its children do, such as attention: see :func:`watch`."""

    swap_rank = -2

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward; what is kept inside goes through :func:`.saved.keep_or_derive`."""
        if not traces_eagerly():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        watch()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            pop()
