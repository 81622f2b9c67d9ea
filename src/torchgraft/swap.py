"""Generated subclasses: the one way in which torchgraft changes a module.

``swap(module, Layer)`` gives the module a generated subclass of its own class, with ``Layer`` in front of
it in the method resolution order. The object, its parameters, its state-dict keys and its attributes stay
what they were, ``isinstance`` stays true, and ``unswap`` gives the original class back. Generated classes
are made once per combination, can be pickled and deep-copied, and are seen by ``torch.compile`` as what
they are: ordinary classes.

A layer is a plain class whose methods call ``super()``. It may declare *views*: names of parameters or
buffers that are read through the layer's ``_view(name)`` instead of directly, so that code which uses
``module.weight`` functionally, without calling the module, sees the layer's value too.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

_generated: dict[tuple[type, tuple[type, ...], tuple[str, ...]], type] = {}


def swap(module: nn.Module, layer: type, views: tuple[str, ...] = ()) -> None:
    """Put ``layer`` in front of the module's class; a layer that is already there gains the new views.

    Args:
        module: Any module; changed in place.
        layer: The class whose methods come first. Its attribute ``swap_rank`` (default 0) orders several
            layers on one module: the lowest rank is outermost.
        views: Names of parameters or buffers to be read through ``layer._view(name)``.
    """
    base, layers, names = anatomy_of(type(module))
    layers = tuple(sorted({*layers, layer}, key=lambda c: (getattr(c, "swap_rank", 0), c.__qualname__)))
    module.__class__ = _class_for(base, layers, tuple(sorted({*names, *views})))


def unswap(module: nn.Module, layer: type) -> None:
    """Take ``layer`` (and, with the last layer, every view) away again; a no-op when it is not there."""
    base, layers, names = anatomy_of(type(module))
    if layer not in layers:
        return
    left = tuple(c for c in layers if c is not layer)
    keep = names if any(hasattr(c, "_view") for c in left) else ()
    module.__class__ = _class_for(base, left, keep)


def original_class(module: nn.Module) -> type:
    """The class the module had before anything was swapped in."""
    return anatomy_of(type(module))[0]


def has_layer(module: nn.Module, layer: type) -> bool:
    """Whether ``layer`` is swapped into the module."""
    return layer in anatomy_of(type(module))[1]


def anatomy_of(cls: type) -> tuple[type, tuple[type, ...], tuple[str, ...]]:
    """``(original class, layers, views)`` of a class; ``(cls, (), ())`` for one that was not generated."""
    return cls.__dict__.get("_swap_anatomy", (cls, (), ()))


def _class_for(base: type, layers: tuple[type, ...], views: tuple[str, ...]) -> type:
    if not layers:
        return base
    key = (base, layers, views)
    if key not in _generated:
        body: dict[str, Any] = {name: _view_property(name) for name in views}
        body |= _own_forward(layers)
        body |= {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            "_swap_anatomy": key,
        }
        metaclass: Any = type(base)
        _generated[key] = metaclass(f"Grafted{base.__name__}", (*layers, base), body)
    return _generated[key]


def _own_forward(layers: tuple[type, ...]) -> dict[str, Any]:
    """The outermost layer's ``forward`` with a code object of its own.

    ``torch.compile`` keeps its compiled versions per code object; were it shared by all generated classes,
    a process that compiles several adapted models would soon reach the limit of versions.
    """
    for layer in layers:
        forward = layer.__dict__.get("forward")
        if isinstance(forward, types.FunctionType):
            copied = types.FunctionType(
                forward.__code__.replace(),
                forward.__globals__,
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            copied.__kwdefaults__ = forward.__kwdefaults__
            return {"forward": copied}
    return {}


def _view_property(name: str) -> property:
    def read(self: Any) -> Any:
        try:
            return self._view(name)
        except AttributeError as error:
            # Left as it is, Python would take it for a missing attribute and fall back to the plain parameter.
            raise RuntimeError(f"reading {name!r} through its adapter failed: {error}") from error

    return property(read, doc=f"``{name}`` as the active adapter sees it.")


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    return _rebuild, anatomy_of(type(self)), self.__getstate__()


def _rebuild(base: type, layers: tuple[type, ...], views: tuple[str, ...]) -> nn.Module:
    cls: Any = _class_for(base, layers, views)
    return cls.__new__(cls)
