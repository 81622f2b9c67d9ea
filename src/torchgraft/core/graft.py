"""What runs at an adapted module: the generated forward, the graft point and the tap.

An adapted module has the layer :class:`Grafted` in front of its class and one extra child, named
``torchgraft``: its :class:`GraftPoint`. The point holds the placements of every adapter at this module and,
for the active adapter, four lists of actions:

* ``before``: change the arguments, or read them,
* ``around``: take the place of the module's own forward,
* ``after``: change the output, or read it,
* ``views``: change what reading a parameter or buffer of the module returns.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..lean.hooks import traces_eagerly, watch
from ..lean.saved import pop
from ..swap import swap, unswap

RESERVED = "torchgraft"
"""The one name that an adapted module gains among its children."""

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Action(Protocol):
    """Something that acts at a module; an action defines the methods of the lists it is put in."""

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments to go on with."""
        ...

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """The output, with or without calling ``forward``."""
        ...

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """The output to go on with."""
        ...

    def view(self, name: str, value: Tensor) -> Tensor:
        """What reading ``name`` returns."""
        ...


class Grafted:
    """The layer that is swapped in front of an adapted module's class."""

    swap_rank = 0
    _modules: dict[str, Any]
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward between the actions of the active adapter."""
        point = self._modules["torchgraft"]
        watched = point.lean and torch.is_grad_enabled() and traces_eagerly()
        if watched:
            watch()
        try:
            if point.router is not None:
                return point.router.run(self, super().forward, args, kwargs)  # type: ignore[misc]
            for action in point.before:
                args, kwargs = action.before(args, kwargs)
            if point.around:
                out = point.around[0].around(super().forward, args, kwargs)  # type: ignore[misc]
            else:
                out = super().forward(*args, **kwargs)  # type: ignore[misc]
            for action in point.after:
                out = action.after(args, kwargs, out)
            return out
        finally:
            if watched:
                pop()

    def _view(self, name: str) -> Any:
        value = self._parameters[name] if name in self._parameters else self._buffers[name]
        for action in self._modules["torchgraft"].views.get(name, ()):
            value = action.view(name, value)
        return value


class HidesPoint:
    """Keeps the graft point out of what a container lists: ``nn.Sequential`` runs whatever it iterates over."""

    swap_rank = 2
    _modules: dict[str, Any]

    def _shown(self) -> dict[str, Any]:
        return {name: module for name, module in self._modules.items() if name != RESERVED}

    def __len__(self) -> int:
        return len(self._shown())

    def __iter__(self) -> Any:
        shown = self._shown()
        return iter(shown) if isinstance(self, nn.ModuleDict) else iter(shown.values())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self._modules[index]
        listed = list(self._shown().items())
        if isinstance(index, slice):
            chosen = listed[index]
            return (
                nn.Sequential(OrderedDict(chosen))
                if isinstance(self, nn.Sequential)
                else nn.ModuleList(m for _, m in chosen)
            )
        return listed[index][1]

    def __contains__(self, key: Any) -> bool:
        return key in self._shown() if isinstance(self, nn.ModuleDict) else any(m is key for m in self)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The container as it would be without the point, for changes that count or renumber its members."""
        point = self._modules.pop(RESERVED, None)
        try:
            yield
        finally:
            if point is not None:
                self._modules[RESERVED] = point

    def __setitem__(self, index: Any, module: nn.Module) -> None:
        with self._alone():
            super().__setitem__(index, module)  # type: ignore[misc]

    def __delitem__(self, index: Any) -> None:
        with self._alone():
            super().__delitem__(index)  # type: ignore[misc]

    def append(self, module: nn.Module) -> Any:
        """Append a member."""
        with self._alone():
            return super().append(module)  # type: ignore[misc]

    def insert(self, index: int, module: nn.Module) -> Any:
        """Insert a member."""
        with self._alone():
            return super().insert(index, module)  # type: ignore[misc]

    def extend(self, modules: Any) -> Any:
        """Append several members."""
        with self._alone():
            return super().extend(modules)  # type: ignore[misc]

    def pop(self, key: Any) -> Any:
        """Remove a member and return it."""
        with self._alone():
            return super().pop(key)  # type: ignore[misc]

    def clear(self) -> None:
        """Remove every member."""
        with self._alone():
            super().clear()  # type: ignore[misc]

    def keys(self) -> Any:
        """Names without the graft point."""
        return self._shown().keys()

    def items(self) -> Any:
        """Names and modules without the graft point."""
        return self._shown().items()

    def values(self) -> Any:
        """Modules without the graft point."""
        return self._shown().values()


class GraftPoint(nn.Module):
    """The placements at one module, by adapter name and slot, and the actions of the active adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.actions: dict[str, list[tuple[str, Any]]] = {}
        self.before: tuple[Any, ...] = ()
        self.after: tuple[Any, ...] = ()
        # A tuple, as the others: a module assigned as it is would become a second child.
        self.around: tuple[Any, ...] = ()
        self.views: dict[str, tuple[Any, ...]] = {}
        self.router: Any = None
        # Whether what is trained here keeps handles in place of copies.
        self.lean = False
        self.register_load_state_dict_pre_hook(_remember_prefix)
        self.register_load_state_dict_post_hook(_plain_checkpoint_is_complete)

    def add_action(self, adapter: str, when: str, action: Any) -> None:
        """Append one action of ``adapter``; ``when`` is a list's name or ``view:NAME``."""
        self.actions.setdefault(adapter, []).append((when, action))

    def add_placement(self, adapter: str, slot: str, placement: nn.Module) -> None:
        """Register ``placement`` as a child, so that its parameters belong to the model."""
        if adapter not in self.adapters:
            self.adapters[adapter] = nn.ModuleDict()
        self.adapters[adapter].add_module(slot, placement)

    def drop(self, adapter: str) -> None:
        """Forget everything of ``adapter`` at this module."""
        self.actions.pop(adapter, None)
        if adapter in self.adapters:
            del self.adapters[adapter]

    def select(self, adapter: str | None) -> None:
        """Make ``adapter`` the one that acts here; None: the module behaves as before."""
        chosen = self.actions.get(adapter, []) if adapter is not None else []
        self.before = tuple(a for when, a in chosen if when == "before")
        self.after = tuple(a for when, a in chosen if when == "after")
        self.around = tuple(a for when, a in chosen if when == "around")
        names = [when[5:] for when, _ in chosen if when.startswith("view:")]
        self.views = {n: tuple(a for when, a in chosen if when == f"view:{n}") for n in names}


def graft_point(module: nn.Module, views: tuple[str, ...] = ()) -> GraftPoint:
    """The graft point of ``module``, made when there is none; ``views`` as in :func:`torchgraft.swap.swap`."""
    if RESERVED not in module._modules:
        module.add_module(RESERVED, GraftPoint())
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            swap(module, HidesPoint)
    swap(module, Grafted, views)
    return module._modules[RESERVED]  # type: ignore[return-value]


def existing_point(module: nn.Module) -> GraftPoint | None:
    """The graft point of ``module``, or None when nothing was ever attached to it."""
    return module._modules.get(RESERVED)  # type: ignore[return-value]


def remove_point(module: nn.Module) -> None:
    """Give ``module`` its own class back and delete its graft point."""
    for layer in (Grafted, HidesPoint):
        unswap(module, layer)
    module._modules.pop(RESERVED, None)


class Tap:
    """Carries one tensor from a source site to a target site within one forward."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def put(self, value: Tensor) -> None:
        """Store the tensor for the target."""
        self.value = value

    def take(self) -> Tensor:
        """Return the stored tensor and forget it, so that nothing outlives the forward."""
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError(
                "the target of a tapped placement ran before its source; "
                "the two modules must run in this order within one forward"
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None}


def first_tensor(args: Args, kwargs: Kwargs) -> Tensor:
    """The tensor a module was called with: its first tensor argument."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("the adapted module was called without a tensor")


def replace_first(args: Args, kwargs: Kwargs, value: Tensor) -> tuple[Args, Kwargs]:
    """The same arguments with the first tensor replaced."""
    for i, old in enumerate(args):
        if isinstance(old, Tensor):
            return (*args[:i], value, *args[i + 1 :]), kwargs
    for name, old in kwargs.items():
        if isinstance(old, Tensor):
            return args, {**kwargs, name: value}
    raise TypeError("the adapted module was called without a tensor")


def first_output(out: Any) -> Tensor:
    """The tensor a module returned: the output itself or its first element."""
    if isinstance(out, Tensor):
        return out
    values = out.values() if isinstance(out, Mapping) else out
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError("the adapted module returned no tensor")


def replace_output(out: Any, value: Tensor) -> Any:
    """The same output with the first tensor replaced (tuples, lists and named tuples keep their type)."""
    if isinstance(out, Tensor):
        return value
    if isinstance(out, tuple) and hasattr(out, "_replace"):
        return out._replace(**{out._fields[0]: value})  # type: ignore[attr-defined]
    if isinstance(out, tuple):
        return (value, *out[1:])
    if isinstance(out, list):
        return [value, *out[1:]]
    out = type(out)(out)
    out[next(iter(out))] = value
    return out


def recomputing() -> bool:
    """Whether this forward is the second one of gradient checkpointing, run inside the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _remember_prefix(point: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    point._loading = prefix, any(key.startswith(prefix) for key in state_dict)  # type: ignore[assignment]


def _plain_checkpoint_is_complete(point: nn.Module, incompatible: Any) -> None:
    """A checkpoint of the backbone alone loads strictly: it lacks nothing that belongs to the backbone."""
    prefix, present = point.__dict__.pop("_loading", ("", True))
    if not present:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.startswith(prefix)]
