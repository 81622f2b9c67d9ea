"""What passes the boundaries of a model's modules in one forward: which tensors, of what shape, and who made them.

The record behind :func:`torchgraft.core.prefix.find_cut`. Hooks are used here as in the dry run: read-only, and gone
when the run ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..errors import GraftError
from .blocks import inner_modules
from .cut import BatchShape
from .graft import first_tensor
from .probe import Example


@dataclasses.dataclass(frozen=True)
class Boundary:
    """The tensor that a module was given, or that it returned.

    Attributes:
        key: Which tensor it is, and how often it was changed in place.
        shape: Its shape.
        stride: Its strides.
        dtype: Its type.
        trained: Whether it depends on a trained parameter.
    """

    key: tuple[int, int]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    trained: bool


@dataclasses.dataclass(frozen=True)
class Values:
    """What a returned tensor holds, as far as it takes to tell it from another one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sums: tuple[float, float]


@dataclasses.dataclass
class Call:
    """One call of a module.

    Attributes:
        path: Path of the module.
        caller: Index of the call inside which it happened, None for the model's own.
        entered: When it began, in events since the forward began.
        given: Its first tensor argument, None when it has none.
        left: When it ended.
        gave: What it returned, None when that is no single tensor.
        returned: All that it returned: :class:`Values`, and then shapes for any number of images, for tensors.
        constant: Whether that is the same for all images.
    """

    path: str
    caller: int | None
    entered: int
    given: Boundary | None
    left: int = -1
    gave: Boundary | None = None
    returned: Any = None
    constant: bool = False


def record(model: nn.Module, example: Example) -> tuple[list[Call], list[Tensor]]:
    """Every call of one forward, with gradients on so that what depends on trained parameters shows."""
    calls: list[Call] = []
    open_calls: list[int] = []
    alive: list[Tensor] = []
    clock = iter(range(10**9))

    def boundary(tensor: Tensor) -> Boundary:
        if not tensor.requires_grad:
            alive.append(tensor)  # a freed tensor's identity would be given to another one
        key = id(tensor), tensor._version
        return Boundary(key, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = first_if_any(args, kwargs)
            caller = open_calls[-1] if open_calls else None
            calls.append(Call(path, caller, next(clock), None if tensor is None else boundary(tensor)))
            open_calls.append(len(calls) - 1)

        return hook

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        call = calls[open_calls.pop()]
        call.left, call.returned = next(clock), tree_map_only(Tensor, _values, out)
        if isinstance(out, Tensor):
            call.gave = boundary(out)

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for path, module in inner_modules(model):
            hooks.enter_context(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave))
        out = model(*example[0], **example[1])
    return calls, tensors_of(out)


def for_any_number(model: nn.Module, seen: list[Call], one: list[Call], other: list[Call]) -> list[Call]:
    """The calls of a forward with two images, with what they return as a function of the number of images.

    Args:
        model: The model.
        seen: Its calls for two images.
        one: Likewise for the first of them alone.
        other: Likewise for two other images.

    Raises:
        GraftError: The model calls other modules for another number of images.
    """
    if not [c.path for c in seen] == [c.path for c in one] == [c.path for c in other]:
        raise GraftError(
            f"prefix cache: {type(model).__name__} calls other modules for another number of images, "
            "so what it computes for one image cannot be kept; train without the cache"
        )
    held = [(a.path, tree_leaves(a.returned), tree_leaves(b.returned)) for a, b in zip(seen, other, strict=True)]
    varying = {path for path, a, b in held if a != b or not any(isinstance(leaf, Values) for leaf in a)}
    for call, single in zip(seen, one, strict=True):
        call.constant = call.path not in varying
        call.returned = tree_map(_growing, call.returned, single.returned)
    return seen


def first_if_any(args: Any, kwargs: Any) -> Tensor | None:
    """The first tensor argument of a call, None when it has none."""
    try:
        return first_tensor(args, kwargs)
    except TypeError:
        return None


def tensors_of(out: Any) -> list[Tensor]:
    """The tensors in what a model returned."""
    return [leaf.detach() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _values(tensor: Tensor) -> Values:
    numbers = tensor.detach().float()
    return Values(tuple(tensor.shape), tensor.dtype, (float(numbers.sum()), float(numbers.abs().sum())))


def _growing(two: Any, one: Any) -> Any:
    if not isinstance(two, Values):
        return two
    return BatchShape(one.shape, tuple(b - a for a, b in zip(one.shape, two.shape, strict=True)), two.dtype)
