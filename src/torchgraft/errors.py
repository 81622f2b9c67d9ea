"""The one error type that is meant for the person who reads it.

Every message says what was given, what was expected and what to do. The command line prints it on one
line and leaves with exit code 2; in Python it is an ordinary ``ValueError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftError(ValueError):
    """A mistake of the caller or in the input: one line, no traceback needed to understand it."""


def nearest(name: str, options: Iterable[str], *, count: int = 3) -> str:
    """The part of an error message that names the valid options closest to ``name``.

    Args:
        name: What was given.
        options: Every valid name.
        count: How many names to offer at most.

    Returns:
        ``"did you mean 'a' or 'b'?"``, or the whole list when nothing is close and it is short.
    """
    known = sorted(set(options))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if len(known) <= 12:
        return "use one of " + ", ".join(known) if known else "none is available"
    return f"{len(known)} names are available, for example " + ", ".join(known[:3])
