"""Methods: frozen dataclasses that say what is added where, their registry, and their string form."""

from __future__ import annotations

import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import yaml

from ..errors import GraftError, nearest

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .placements import Placement

_registry: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass adds fields (its hyper-parameters) and :meth:`placements`."""

    name: ClassVar[str] = ""

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """What this method adds to the model that ``anatomy`` describes.

        Raises:
            GraftError: The model has no place for it; the message says which places it looked for.
        """
        raise TypeError(f"{type(self).__name__} defines no placements")

    def __str__(self) -> str:
        changed = [
            f"{f.name}={_literal(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}[{', '.join(changed)}]" if changed else self.name

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain data."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A config from plain data; unknown names and values of the wrong type are errors.

        Raises:
            GraftError: Names the field, what was given and what was expected.
        """
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in known:
                hint = nearest(key, known) if known else "it has no options"
                raise GraftError(f"{cls.name}: unknown option {key!r}; {hint}")
            if not _fits(value, hints[key]):
                raise GraftError(f"{cls.name}: {key}={value!r} is not valid; expected {_described(hints[key])}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclasses.dataclass(frozen=True)
class Combination(Method):
    """Several methods as one: attached, saved, loaded and counted together."""

    name: ClassVar[str] = "combination"
    parts: tuple[Method, ...] = ()

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """The placements of every part, in order."""
        return [p for part in self.parts for p in part.placements(anatomy)]

    def __str__(self) -> str:
        return " + ".join(str(p) for p in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """The parts as plain data."""
        return {"parts": [{"method": p.name, **p.to_dict()} for p in self.parts]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The combination from plain data."""
        parts = []
        for part in values.get("parts", []):
            options = dict(part)
            parts.append(method_class(options.pop("method")).from_dict(options))
        return cls(tuple(parts))


_registry[Combination.name] = Combination


def register(name: str) -> Callable[[M], M]:
    """Class decorator that makes a method known under ``name``."""

    def add(cls: M) -> M:
        if name in _registry and _registry[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"a method named {name!r} is registered already: {_registry[name].__name__}")
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def methods() -> dict[str, type[Method]]:
    """Every registered method by name."""
    _fill()
    return {name: cls for name, cls in sorted(_registry.items()) if cls is not Combination}


def method_class(name: str) -> type[Method]:
    """The registered method of this name.

    Raises:
        GraftError: No such method; names the nearest ones.
    """
    _fill()
    if name not in _registry:
        raise GraftError(f"unknown method {name!r}; {nearest(name, methods())}")
    return _registry[name]


def method(spec: str | Method | Iterable[str | Method]) -> Method:
    """A config from its string form, from a config, or from several of either.

    Args:
        spec: ``"conv-adapter"``, ``"conv-adapter[reduction=4, scheme=conv-parallel]"``,
            ``"ssf + conv-adapter[reduction=8]"``, a config, or a list of these.

    Raises:
        GraftError: Unknown name, unknown option, or a value of the wrong type.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, str):
        parts = [p.strip() for p in re.split(r"\+(?![^\[]*\])", spec)]
        if len(parts) == 1:
            return _parse(parts[0])
        return Combination(tuple(_parse(p) for p in parts))
    if isinstance(spec, Iterable) and not isinstance(spec, (bytes, dict)):
        listed = [method(part) for part in spec]
        if listed:
            return listed[0] if len(listed) == 1 else Combination(tuple(listed))
    raise GraftError(f"{spec!r} is no method; expected a name such as 'conv-adapter[reduction=4]', a config or a list")


def _fill() -> None:
    """Let the methods register themselves; core names none of them."""
    importlib.import_module(f"{__name__.partition('.')[0]}.methods")


def _parse(text: str) -> Method:
    match = re.fullmatch(r"([A-Za-z][\w-]*)\s*(?:\[(.*)\])?", text, re.DOTALL)
    if match is None:
        raise GraftError(f"cannot read the method {text!r}; expected a form such as 'conv-adapter[reduction=4]'")
    cls = method_class(match[1])
    options: dict[str, Any] = {}
    for part in _split_options(match[2] or ""):
        key, equals, value = part.partition("=")
        if not equals:
            raise GraftError(f"{cls.name}: cannot read the option {part!r}; expected name=value")
        options[key.strip()] = yaml.safe_load(value.strip())
    return cls.from_dict(options)


def _split_options(text: str) -> list[str]:
    """Split at commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            if text[start:i].strip():
                parts.append(text[start:i].strip())
            start = i + 1
    return parts


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Any:
        return True
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(a) for a in args)
    if origin is tuple:
        return f"a list of {_described(args[0])}"
    if hint is type(None):
        return "null"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(hint, str(hint))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    return str(value)
