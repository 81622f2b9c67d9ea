"""Methods: frozen dataclasses that say what is added where, their registry, and their string form.

The string form is ``name[option=value, ...]``, joined by ``+``. A value is ``null``, ``true``, ``false``, a
number, a word, a list ``[a, b]``, or text in quotes: ``'it''s'`` with doubled quotes, or ``"a\\nb"`` with
JSON's escapes. Text that could be taken for something else is written in quotes, so every config comes
back from its string form as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from ..errors import GraftError, nearest
from .plugins import load_plugins

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .placements import Placement

_registry: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")

_SINGLE, _DOUBLE = r"'(?:[^']|'')*'", r'"(?:[^"\\]|\\.)*"'
_TOKEN = re.compile(rf"{_SINGLE}|{_DOUBLE}|.", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INFINITY = re.compile(r"([+-]?)\.?inf", re.IGNORECASE)
_CONSTANTS = {"": None, "null": None, "true": True, "false": False}
_READ_BARE = re.compile(r"[\w.+-][\w.+*/ -]*")
_WRITTEN_BARE = re.compile(r"[\w.][\w./-]*")


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
        fields = {f.name: f for f in dataclasses.fields(cls)}
        typed = {}
        for key, value in values.items():
            if key not in fields:
                hint = nearest(str(key), fields) if fields else "it has no options"
                raise GraftError(f"{cls.name}: unknown option {key!r}; {hint}")
            try:
                typed[key] = _typed(value, hints[key])
            except TypeError:
                expected = _described(hints[key])
                raise GraftError(f"{cls.name}: {key}={_shown(value)} is not valid; expected {expected}") from None
        for key, field in fields.items():
            if key not in typed and field.default is field.default_factory is dataclasses.MISSING:
                raise GraftError(f"{cls.name}: the option {key!r} is missing; expected {_described(hints[key])}")
        return cls(**typed)


@dataclasses.dataclass(frozen=True)
class Combination(Method):
    """Several methods as one: attached, saved, loaded and counted together.

    A combination among the parts is replaced by its own parts.
    """

    name: ClassVar[str] = "combination"
    parts: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        flat = [p for part in self.parts for p in (part.parts if isinstance(part, Combination) else (part,))]
        object.__setattr__(self, "parts", tuple(flat))

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
        """The combination from plain data: ``{"parts": [{"method": name, **options}, ...]}``.

        Raises:
            GraftError: The data has another form, names an unknown method, or a part's options are not valid.
        """
        listed = values.get("parts") if isinstance(values, dict) and set(values) == {"parts"} else None
        if not isinstance(listed, (list, tuple)) or not listed:
            raise GraftError(f"{cls.name}: {_shown(values)} is not valid; expected 'parts', a list of methods")
        parts = []
        for part in listed:
            if not isinstance(part, dict) or not isinstance(part.get("method"), str):
                raise GraftError(f"{cls.name}: the part {_shown(part)} is not valid; expected 'method' and its options")
            options = {k: v for k, v in part.items() if k != "method"}
            parts.append(method_class(part["method"]).from_dict(options))
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
        GraftError: Unknown name, unknown option, a value of the wrong type, or text that is no such form.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, str):
        parts = [_parse(part, spec) for part in _split(spec, "+", spec)]
        return parts[0] if len(parts) == 1 else Combination(tuple(parts))
    if isinstance(spec, Iterable) and not isinstance(spec, (bytes, dict)):
        listed = [method(part) for part in spec]
        if listed:
            return listed[0] if len(listed) == 1 else Combination(tuple(listed))
    expected = "a name such as 'conv-adapter[reduction=4]', a config or a list"
    raise GraftError(f"{_shown(spec)} is no method; expected {expected}")


def _fill() -> None:
    """Let the methods register themselves, ours and those of other packages; core names none of them."""
    importlib.import_module(f"{__name__.partition('.')[0]}.methods")
    load_plugins()


def _parse(text: str, whole: str) -> Method:
    """The config of one method; ``whole`` is the text that the errors show."""
    match = re.fullmatch(r"([A-Za-z][\w-]*)\s*(?:\[(.*)\])?", text, re.DOTALL)
    if match is None:
        where = "" if text == whole.strip() else f" in {whole!r}"
        raise GraftError(f"cannot read the method {text!r}{where}; expected a form such as 'conv-adapter[reduction=4]'")
    cls = method_class(match[1])
    options: dict[str, Any] = {}
    for part in _listed(match[2] or "", whole):
        key, equals, value = (t.strip() for t in part.partition("="))
        if not equals:
            raise GraftError(f"{cls.name}: cannot read the option {part!r}; expected name=value")
        if key in options:
            raise GraftError(f"{cls.name}: the option {key!r} is given twice; expected it once")
        options[key] = _value(value, whole)
    return cls.from_dict(options)


def _split(text: str, separator: str, whole: str) -> list[str]:
    """Split where the separator stands in no bracket and no quotes."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] == "[") - (token[0] == "]")
        if depth < 0 or token[0] in ("'", '"'):
            break
        if token[0] == separator and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    else:
        if depth == 0:
            return [*parts, text[start:].strip()]
    raise GraftError(f"cannot read the method {whole!r}; expected every bracket and every quote in a pair")


def _listed(text: str, whole: str) -> list[str]:
    """The parts between commas; one comma may stand at the end."""
    parts = _split(text, ",", whole)
    return parts if parts[-1] else parts[:-1]


def _value(text: str, whole: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return [_value(part, whole) for part in _listed(text[1:-1], whole)]
    if re.fullmatch(_SINGLE, text):
        return text[1:-1].replace("''", "'")
    if text.startswith('"'):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(text)
    if not text or _READ_BARE.fullmatch(text):
        return _bare(text)
    expected = "null, true, false, a number, a word, a list such as [a, b], or text in single quotes"
    raise GraftError(f"cannot read the value {text!r} in {whole!r}; expected {expected}")


def _bare(text: str) -> Any:
    """What text without quotes and brackets stands for."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if infinity := _INFINITY.fullmatch(text):
        return float(f"{infinity[1]}inf")
    return int(text) if _INTEGER.fullmatch(text) else float(text) if _FLOAT.fullmatch(text) else text


def _literal(value: Any) -> str:
    """The text that :func:`_value` reads as ``value``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    text = str(value)
    if isinstance(value, (int, float)) or (_WRITTEN_BARE.fullmatch(text) and _bare(text) == text):
        return text
    if not text.isprintable():  # a line break between single quotes would leave the one line
        return json.dumps(text)
    return "'" + text.replace("'", "''") + "'"


def _typed(value: Any, hint: Any) -> Any:
    """The value as a field of this type holds it; a TypeError if it does not fit."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            with contextlib.suppress(TypeError):
                return _typed(value, arg)
        fits = False
    elif origin in (tuple, list):
        fits = isinstance(value, (tuple, list))
        if fits and args:
            each = args if origin is tuple and args[-1] is not Ellipsis else args[:1] * len(value)
            fits = len(each) == len(value)
            value = [_typed(v, a) for v, a in zip(value, each, strict=False)]
        value = origin(value) if fits else value
    elif origin is typing.Literal:
        fits = any(type(value) is type(a) and value == a for a in args)
    elif hint in (int, float):
        # A config with nan in it would not equal itself.
        fits = isinstance(value, (int, hint)) and not isinstance(value, bool) and value == value
    else:
        fits = hint is Any or isinstance(value, origin)
    if not fits:
        raise TypeError(value)
    return value


def _described(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(a) for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return "a list [" + ", ".join(_described(a) for a in args) + "]"
    if origin in (tuple, list):
        return f"a list of {_described(args[0])}"
    if hint is type(None):
        return "null"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(hint, str(hint))


def _shown(value: Any) -> str:
    """The value on one line of an error; a model given by mistake has many."""
    return repr(value) if isinstance(value, str) else textwrap.shorten(repr(value), 120, placeholder=" ...")


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
