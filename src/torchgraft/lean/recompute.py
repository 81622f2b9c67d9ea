"""Modules that run twice: their inner tensors are not kept but computed again in the backward.

As gradient checkpointing does, with three differences. The module's input is kept as a handle where it follows from
something that is kept anyway (the output of a LayerNorm). The module's parameters are not among what is computed again,
so the second run ends before the last matrix product. And lean layers inside are known, so nothing is kept twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .hooks import traces_eagerly
from .saved import Packed, Reference, autocast_state, keep_or_derive, outer_hooks, pop, push, restored, unpack


class Recomputed:
    """In front of a module's own forward, inside of what adapters do at the module."""

    swap_rank = 6
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if not traces_eagerly() or not all(map(_is_value, (*args, *kwargs.values()))):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        run = SecondRun(super().forward, args, kwargs, _own_tensors(self), self.training)  # type: ignore[misc,arg-type]
        push(run.pack, unpack)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            pop()


class _StopError(Exception):
    """All that the backward asks for has been computed."""


class SecondRun:
    """One forward of a module, and how to do it again."""

    def __init__(self, forward: Any, args: Any, kwargs: Any, own: set[int], training: bool) -> None:
        self.forward, self.own, self.count = forward, own, 0
        self.given: Any = (args, kwargs)
        self.versions = [x._version for x in tree_flatten(self.given)[0] if isinstance(x, Tensor)]
        self.outer = outer_hooks()
        self.inputs: Any = None
        self.values: dict[int, Tensor] = {}
        # Read here: inside a hook the operator's own dispatch has switched autocast off.
        self.autocast = autocast_state(next((d.type for d in _devices(args, kwargs)), "cpu"))
        self.random = random_state(args, kwargs) if training else None

    def pack(self, t: Tensor) -> Packed:
        """A numbered place in the second run; what belongs to the module is referred to."""
        if t.untyped_storage()._cdata in self.own:
            return Reference(t)
        if self.inputs is None:
            self._keep_inputs()
        self.count += 1
        return _Slot(self, self.count - 1)

    def _keep_inputs(self) -> None:
        leaves, spec = tree_flatten(self.given)
        if self.versions != [x._version for x in leaves if isinstance(x, Tensor)]:
            raise RuntimeError(
                "lean: a module changes its input in place, so it cannot be run a second time from that input; "
                'use lean="exact"'
            )
        kept = [(keep_or_derive(x, self.outer), x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        self.inputs, self.given = (kept, spec), None

    def value(self, index: int) -> Tensor:
        """What the forward handed over as number ``index``."""
        if index not in self.values:
            self._again()
        if index not in self.values:
            raise RuntimeError(
                f"lean: the second run of a module kept {len(self.values)} tensors where the first kept {self.count}; "
                'it depends on more than its arguments, so use lean="exact"'
            )
        return self.values.pop(index)

    def _again(self) -> None:
        kept, spec = self.inputs
        alive: list[Tensor] = []
        leaves = [restored(x[0], alive).detach().requires_grad_(x[1]) if isinstance(x, tuple) else x for x in kept]
        args, kwargs = tree_unflatten(leaves, spec)
        count = 0

        def collect(t: Tensor) -> Packed:
            nonlocal count
            if t.untyped_storage()._cdata in self.own:
                return Reference(t)
            self.values[count] = t.detach()
            count += 1
            if count == self.count:
                raise _StopError
            return Reference(t)

        device, state = self.autocast
        with torch.enable_grad(), torch.autocast(device, **state), with_random_state(self.random):
            push(collect, unpack)
            try:
                self.forward(*args, **kwargs)
            except _StopError:
                pass
            finally:
                pop()


class _Slot:
    """A tensor of the second run."""

    __slots__ = ("index", "run")

    def __init__(self, run: SecondRun, index: int) -> None:
        self.run, self.index = run, index

    def unpack(self) -> Tensor:
        return self.run.value(self.index)


def _own_tensors(module: nn.Module) -> set[int]:
    """Storages that are the same in both runs; a norm that follows its batch works on copies in the second."""
    steady = [b for m in module.modules() if not m.training for b in m._buffers.values() if b is not None]
    return {t.untyped_storage()._cdata for t in (*module.parameters(), *steady)}


def _is_value(given: Any) -> bool:
    """Whether an argument is the same in a second run; a cache of keys and values, which the first fills, is not."""
    if isinstance(given, (tuple, list)):
        return all(map(_is_value, given))
    if isinstance(given, dict):
        return type(given) is dict and all(map(_is_value, given.values()))
    return given is None or isinstance(given, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def _devices(args: Any, kwargs: Any) -> list[torch.device]:
    """Where the tensors among the arguments are."""
    return [x.device for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]


def random_state(args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    """State of the generators that the forward may draw from."""
    devices = {d for d in _devices(args, kwargs) if d.type == "cuda"}
    return [("cpu", torch.get_rng_state()), *((str(d), torch.cuda.get_rng_state(d)) for d in devices)]


@contextlib.contextmanager
def with_random_state(state: list[tuple[str, Tensor]] | None) -> Iterator[None]:
    """Generators inside draw on from ``state``, and are afterwards where they were."""
    if state is None:
        yield
        return
    devices = [torch.device(d) for d, _ in state if d != "cpu"]
    with torch.random.fork_rng(devices):
        for device, value in state:
            torch.set_rng_state(value) if device == "cpu" else torch.cuda.set_rng_state(value, device)
        yield
