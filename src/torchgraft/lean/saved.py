"""What autograd keeps between forward and backward, in packed form.

Lean layers run PyTorch's own operators under saved-tensor hooks. What an operator hands over is packed as the least
from which the very bits can be had again:

* :class:`Layout`: nothing but shape and strides, for tensors whose values the backward never reads,
* :class:`Derived`: a recipe and a tensor that is kept anyway, for what an elementwise layer made of it,
* :class:`Kept`: the tensor itself, handed on to the hooks that were there before (gradient checkpointing, offloading,
  byte counters), so that those see exactly what is kept.

A hook sees a tensor without knowing where it came from. :func:`derive` tells: it notes that a tensor is the result of a
recipe, for as long as that tensor lives.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

push: Callable[..., None] = torch._C._autograd._push_saved_tensors_default_hooks
pop: Callable[[], None] = torch._C._autograd._pop_saved_tensors_default_hooks
_top: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks

DROPPED_AS_NAN = os.environ.get("TORCHGRAFT_LEAN_NAN", "") not in ("", "0")
"""Debug switch: dropped tensors come back filled with NaN, so that a backward that reads them shows."""

_SMALL_SHARE = 4
"""A view of less than one part in so many of its storage is copied when kept, so that the rest can go."""


class Packed(Protocol):
    """What a pack hook returns in place of a tensor."""

    def unpack(self) -> Tensor:
        """The tensor, with the bits that the backward asks for."""
        ...


def unpack(packed: Any) -> Tensor:
    """The unpack hook of every lean layer."""
    return packed.unpack()


def outer_hooks() -> Any:
    """The pair of hooks that act outside; None when there is none."""
    return _top(True)


class Layout:
    """A tensor whose values are never read: its shape, strides, type and device."""

    __slots__ = ("device", "dtype", "shape", "stride")

    def __init__(self, t: Tensor) -> None:
        self.shape, self.stride, self.dtype, self.device = t.shape, t.stride(), t.dtype, t.device

    def unpack(self) -> Tensor:
        """An untouched buffer of that layout."""
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.fill_(float("nan")) if DROPPED_AS_NAN and empty.is_floating_point() else empty


class Reference:
    """A tensor as it is; one that was changed in place meanwhile is an error, as without hooks."""

    __slots__ = ("tensor", "version")

    def __init__(self, t: Tensor) -> None:
        self.tensor, self.version = t.detach(), t._version

    def unpack(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: It was changed in place since.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tuple(self.tensor.shape)} is at version {self.tensor._version}; expected version {self.version}"
            )
        return self.tensor


class Handed:
    """A tensor that the hooks outside keep."""

    __slots__ = ("held", "restore")

    def __init__(self, t: Tensor, hooks: Any) -> None:
        self.held, self.restore = hooks[0](t), hooks[1]

    def unpack(self) -> Tensor:
        """What the hooks outside give back."""
        return self.restore(self.held)


def keep(t: Tensor, outer: Any) -> Packed:
    """Keep a tensor itself, by reference or through the hooks outside; a small view without the rest of its storage."""
    if t.numel() * t.element_size() * _SMALL_SHARE <= t.untyped_storage().nbytes() and t.numel():
        t = t.clone()
    return Reference(t) if outer is None else Handed(t, outer)


# -- tensors that a recipe makes from another one -----------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Origin:
    """Where a living tensor came from."""

    out: Any  # weakref to it, or to what it is a view of
    version: int
    layout: Layout
    offset: Any
    recipe: Recipe
    source: Tensor


class Recipe:
    """A deterministic function of one tensor, to be run again under the autocast state it ran under.

    Args:
        function: The function.
        reads: Tensors that it reads besides its argument; changing them in place before the backward is an error.
        device: Type of the device it runs on.
    """

    __slots__ = ("autocast", "function", "reads")

    def __init__(self, function: Callable[[Tensor], Tensor], reads: tuple[Tensor, ...], device: str) -> None:
        self.function, self.autocast = function, autocast_state(device)
        self.reads = tuple((t, t._version) for t in reads)

    def __call__(self, source: Tensor) -> Tensor:
        """Run it again, without a graph."""
        for tensor, version in self.reads:
            if tensor._version != version:
                raise RuntimeError(
                    "a parameter needed for gradient computation was changed in place between forward and backward "
                    f"(shape {tuple(tensor.shape)}); call backward() before optimizer.step()"
                )
        device, state = self.autocast
        with torch.no_grad(), torch.autocast(device, **state):
            return self.function(source)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device (the meta device has none)."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_state(device: str) -> tuple[str, dict[str, Any]]:
    """Arguments of ``torch.autocast`` that bring the present state back."""
    if not torch.amp.is_autocast_available(device):
        return "cpu", {"enabled": False}
    enabled = torch.is_autocast_enabled(device)
    return device, {"enabled": enabled, "dtype": torch.get_autocast_dtype(device) if enabled else None}


_origins: dict[int, _Origin] = {}


def derive(out: Tensor, function: Callable[[Tensor], Tensor], source: Tensor, reads: tuple[Tensor, ...] = ()) -> None:
    """Note that ``out`` equals ``function(source)`` bit for bit and that the backward keeps ``source`` anyway.

    Args:
        out: The result; nothing is noted for one that fills only a part of its storage.
        function: Deterministic, without side effects.
        source: Its argument.
        reads: What else the function reads.
    """
    storage = out.untyped_storage()
    if storage.nbytes() != out.numel() * out.element_size() or storage._cdata == source.untyped_storage()._cdata:
        return
    _note(out, Recipe(function, reads, out.device.type), source)


def _note(out: Tensor, recipe: Recipe, source: Tensor) -> None:
    storage = out.untyped_storage()
    key = storage._cdata
    # Of the memory, not of a tensor on it: a view may die while another lives on.
    alive = weakref.ref(storage, lambda _: _origins.pop(key, None))
    _origins[key] = _Origin(alive, out._version, Layout(out), out.storage_offset(), recipe, source)


class Derived:
    """A tensor (or a view of one) that a recipe makes again from what is kept anyway."""

    __slots__ = ("offset", "origin", "shape", "source", "stride")

    def __init__(self, t: Tensor, origin: _Origin, source: Packed) -> None:
        self.shape, self.stride = t.shape, t.stride()
        self.offset = t.storage_offset() - origin.offset
        self.origin, self.source = _Result(origin), source

    def unpack(self) -> Tensor:
        """Run the recipe, and note that the result is one: what runs again on it keeps the same handles."""
        source = self.source.unpack()
        whole = self.origin.of(source)
        _note(whole, self.origin.recipe, source)
        return self._seen(whole)

    def restore(self, alive: list[Tensor]) -> Tensor:
        """As :meth:`unpack`, and note again where the tensor came from, for as long as ``alive`` lives."""
        source = restored(self.source, alive)
        whole = self.origin.of(source)
        alive += [source, whole]
        _note(whole, self.origin.recipe, source)
        return self._seen(whole)

    def _seen(self, whole: Tensor) -> Tensor:
        if whole.shape == self.shape and whole.stride() == self.stride:
            return whole
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


class _Result:
    """What a recipe returns, in the memory layout that it first had."""

    __slots__ = ("layout", "recipe")

    def __init__(self, origin: _Origin) -> None:
        self.recipe, self.layout = origin.recipe, origin.layout

    def of(self, source: Tensor) -> Tensor:
        whole = self.recipe(source)
        dense = whole.untyped_storage().nbytes() == whole.numel() * whole.element_size()
        if whole.stride() != self.layout.stride or not dense:
            shape, stride = self.layout.shape, self.layout.stride
            whole = torch.empty_strided(shape, stride, dtype=whole.dtype, device=whole.device).copy_(whole)
        return whole


def origin_of(t: Tensor) -> _Origin | None:
    """Where ``t`` (or what it is a view of) came from; None when that is not known or it has been changed since."""
    origin = _origins.get(t.untyped_storage()._cdata)
    if origin is None:
        return None
    if origin.out() is None or t._version != origin.version or t.dtype != origin.layout.dtype:
        return None
    return origin


def keep_or_derive(t: Tensor, outer: Any) -> Packed:
    """Keep ``t``, or the handle of a recipe where there is one whose source is kept anyway."""
    origin = origin_of(t)
    if origin is None:
        return keep(t, outer)
    return Derived(t, origin, keep_or_derive(origin.source, outer))


def restored(packed: Packed, alive: list[Tensor]) -> Tensor:
    """The tensor, and with it the knowledge of where it came from; ``alive`` receives what must not die meanwhile."""
    return packed.restore(alive) if isinstance(packed, Derived) else packed.unpack()
