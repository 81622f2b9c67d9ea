"""Tables of the methods' pages, so that what they say is tested."""

from __future__ import annotations

from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "methods"


def table(page: str, heading: str) -> list[dict[str, str]]:
    """The rows, by column, of the table whose first line begins with ``heading``."""
    text = (PAGES / page).read_text(encoding="utf-8")
    lines = text[text.index(heading) :].splitlines()
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    end = next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:end]]
