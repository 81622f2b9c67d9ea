"""CSV files that list pictures: a header ``path,label`` or ``path,label,split``, one picture a line.

Paths are relative to the CSV file. Without a ``split`` column every line belongs to train. Other columns are
ignored.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ..errors import GraftError, nearest
from .dataset import Source
from .folders import PART_NAMES, Listed, checked_source
from .images import ProgressCallback
from .splits import natural_key


def load_csv(path: Path, *, strict: bool = False, progress: ProgressCallback | None = None) -> Source:
    """Read a CSV file that lists pictures.

    Args:
        path: The CSV file.
        strict: Refuse pictures that cannot be read, instead of leaving them out.
        progress: Told how far the check of the pictures is.

    Raises:
        GraftError: The file cannot be read, a column or value is missing or wrong, a picture is listed twice,
            or a class cannot be trained on.
    """
    rows = _rows(path)
    if not rows:
        raise GraftError(f"{path} lists no images; expected lines of path,label below the header")
    labels = sorted({label for _, label, _ in rows}, key=natural_key)
    trained = {label for _, label, part in rows if part == "train"}
    if not trained:
        raise GraftError(f"{path} has no line whose split is train")
    unknown = [label for label in labels if label not in trained]
    if unknown:
        raise GraftError(
            f"the label {unknown[0]!r} in {path} is in val or test but not in train; add images of it to train"
        )
    if len(labels) == 1:
        raise GraftError(f"{path} has a single label, {labels[0]!r}; at least two classes are needed to tell apart")
    listings: dict[str, list[Listed]] = {"train": []}
    for name, label, part in sorted(rows, key=lambda row: natural_key(row[0])):
        listings.setdefault(part, []).append(Listed(path.parent / name, name, labels.index(label)))
    return checked_source(str(path), path, tuple(labels), listings, strict=strict, progress=progress, what="label")


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """(path, label, part) of every line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            lines = list(csv.reader(handle))
    except UnicodeDecodeError as error:
        raise GraftError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise GraftError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    if "path" not in header or "label" not in header:
        raise GraftError(
            f"{path} starts with the header {','.join(header) or '(nothing)'}; "
            "expected path,label or path,label,split, separated by commas"
        )
    column = {name: header.index(name) for name in ("path", "label", "split") if name in header}
    rows: list[tuple[str, str, str]] = []
    first_line: dict[str, int] = {}
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        value = {n: cells[i].strip() if i < len(cells) else "" for n, i in column.items()}
        for name in ("path", "label"):
            if not value[name]:
                raise GraftError(f"{path}, line {number}: the {name} is empty")
        split = value.get("split", "train").lower()
        if split not in PART_NAMES:
            raise GraftError(
                f"{path}, line {number}: the split is {split!r}, expected train, val or test; "
                f"{nearest(split, PART_NAMES)}"
            )
        if value["path"] in first_line:
            raise GraftError(
                f"{path}, line {number}: {value['path']} is listed already in line "
                f"{first_line[value['path']]}; list every image once"
            )
        first_line[value["path"]] = number
        rows.append((value["path"], value["label"], PART_NAMES[split]))
    return rows
