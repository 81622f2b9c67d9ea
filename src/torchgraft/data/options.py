"""Options behind a name: ``counting?per_class=80&size=112``."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import parse_qsl

from ..errors import GraftError, nearest


def split_options(text: str, what: str) -> tuple[str, dict[str, str]]:
    """Split ``NAME?option=value&option=value``.

    Args:
        text: The name, with or without options.
        what: How to call it in an error message, for example ``"sample:counting"``.

    Raises:
        GraftError: An option has no value or is given twice.
    """
    name, mark, query = text.partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if mark else []
    except ValueError as error:
        raise GraftError(
            f"{what}: cannot read the options {query!r}; write them as ?option=value&option=value"
        ) from error
    options = dict(pairs)
    if len(options) != len(pairs):
        raise GraftError(f"{what}: an option is given twice in {query!r}")
    return name, options


def check_options(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse an option that does not exist.

    Raises:
        GraftError: Names the nearest option.
    """
    known = list(known)
    for option in given:
        if option not in known:
            hint = nearest(option, known) if known else "it has no options"
            raise GraftError(f"{what} has no option {option!r}; {hint}")


def as_int(text: str, option: str, what: str, *, low: int, high: int | None = None) -> int:
    """``text`` as a whole number between ``low`` and ``high``.

    Raises:
        GraftError: It is not one.
    """
    allowed = f"{low} or more" if high is None else f"from {low} to {high}"
    try:
        value = int(text)
    except ValueError as error:
        raise GraftError(f"{what}: {option}={text} is not a whole number {allowed}") from error
    if value < low or (high is not None and value > high):
        raise GraftError(f"{what}: {option}={text} is out of range; give a whole number {allowed}")
    return value


def as_bool(text: str, option: str, what: str) -> bool:
    """``text`` as yes or no.

    Raises:
        GraftError: It is neither.
    """
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise GraftError(f"{what}: {option}={text} is neither true nor false")
    return values[text.lower()]
