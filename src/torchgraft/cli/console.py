"""How verbs speak: tables and sentences for people, one JSON document for programs.

On a terminal there are colours and tables fit the window. Anywhere else (pipe, file, log of a build) lines
are plain and as long as they need to be, so that nothing is wrapped or cut and ``grep`` finds it.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

TERMINAL = sys.stdout.isatty()
"""Whether standard output is a terminal."""


def say(text: str = "", *, style: str | None = None) -> None:
    """Print one line of text as it is (no markup, no wrapping away from a terminal)."""
    _console().print(text, style=style, soft_wrap=True)


def note(text: str) -> None:
    """Print one line to standard error: progress and remarks that are not the result."""
    print(text, file=sys.stderr, flush=True)


def next_command(sentence: str, *commands: str) -> None:
    """End a verb: say what can be done now and the commands to type, each on its own line."""
    say()
    say(sentence)
    for command in commands:
        say(f"  {command}", style="bold")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Iterable[str] = ()) -> None:
    """Print rows under headings.

    Args:
        columns: The headings.
        rows: One sequence of cells per row; None is an empty cell.
        right: Headings whose column is aligned to the right.
    """
    numeric = set(right)
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not TERMINAL:
        _print_plain([list(columns), *cells], [name in numeric for name in columns])
        return
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        grid.add_column(name, justify="right" if name in numeric else "left", overflow="fold")
    for row in cells:
        grid.add_row(*row)
    _console().print(grid)


def pairs(rows: Iterable[tuple[str, Any]]) -> None:
    """Print names and values in two columns."""
    cells = [[name, str(value)] for name, value in rows]
    if not TERMINAL:
        _print_plain(cells, [False, False])
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in cells:
        grid.add_row(*row)
    _console().print(grid)


def emit_json(payload: Any, *, indent: int | None = 2) -> None:
    """Print the one JSON document of a verb; numbers that JSON lacks (nan, infinity) become null.

    Args:
        payload: Plain data; what is not becomes text.
        indent: Spaces per level; None: the whole document on one line, for logs that are read line by line.
    """
    sys.stdout.write(json.dumps(_plain(payload), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def results_only(active: bool) -> Iterator[None]:
    """While ``active``, whatever is printed to standard output goes to standard error instead."""
    if not active:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """While something takes seconds: a line that says what it is and, on a terminal, at which part.

    Yields:
        A function that takes the name of the part.
    """
    if not sys.stderr.isatty():
        note(f"{what} ...")
        yield lambda part: None
        return
    with Console(stderr=True, markup=False).status(what) as status:
        yield lambda part: status.update(f"{what}: {part}")


def _console() -> Console:
    # Made anew each time: tests and callers exchange sys.stdout. Class names and method texts hold brackets
    # and colons, so nothing is read as markup.
    terminal = None if TERMINAL else False
    return Console(file=sys.stdout, markup=False, highlight=False, emoji=False, force_terminal=terminal)


def _print_plain(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    """Columns two spaces apart, as wide as they need to be, without spaces at the ends of the lines."""
    lines = [[" ".join(cell.split("\n")) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = [
            " " * (width - cell_len(cell)) + cell if flush else cell + " " * (width - cell_len(cell))
            for cell, width, flush in zip(line, widths, right, strict=True)
        ]
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
