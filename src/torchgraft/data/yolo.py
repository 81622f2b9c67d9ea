"""YOLO folders: ``images/`` and ``labels/`` side by side, one text file per picture.

A line is ``class x y width height``, the centre and size as shares of the picture, or ``class x1 y1 x2 y2 x3 y3 ...``,
an outline; where every line is an outline the objects have instance masks. Class k of the files becomes label k + 1.
A picture without a text file has no objects. The class names stand in ``data.yaml`` (``names``, and the parts'
folders or lists under ``train``, ``val`` and ``test``) or in ``classes.txt``, one a line; then the parts are
``images/train`` or ``train/images`` and so on, and plain ``images`` is split.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import GraftError
from .dataset import Skipped
from .detection import Annotated, BoxCheck, DetectionSource, Shape, picture_size
from .folders import PART_NAMES
from .images import IMAGE_SUFFIXES, ProgressCallback, unreadable
from .shapes import Polygons
from .splits import natural_key

_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
_TOLERANCE = 1e-3
"""How far over 0..1 a share may reach: rounding in the tools that write such files."""


def find_yolo(path: Path) -> Path | None:
    """The file that names the classes if ``path`` is YOLO data: a yaml, a ``classes.txt``, or ``labels/`` itself."""
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    for name in _YAML_NAMES:
        if (path / name).is_file():
            return path / name
    folders = [path / "labels", *(path / part / "labels" for part in PART_NAMES)]
    if not any(next(f.rglob("*.txt"), None) for f in folders if f.is_dir()):
        return None
    names = [path / "classes.txt", path / "labels" / "classes.txt", path / "obj.names"]
    return next((f for f in names if f.is_file()), path / "labels")


def load_yolo(
    path: Path, check: BoxCheck, *, masks: bool | None = None, progress: ProgressCallback | None = None
) -> DetectionSource:
    """Read YOLO folders.

    Args:
        path: The folder, or its yaml file.
        check: What is done with boxes at the border and without area.
        masks: False leaves the outlines unused.
        progress: Told how far the check of the pictures is.

    Raises:
        GraftError: The class names or pictures are missing, or a line is wrong; the message names file and line.
    """
    names = find_yolo(path)
    if names is None:
        raise GraftError(f"{path} is no YOLO folder; expected images/, labels/ and data.yaml or classes.txt")
    if names.is_dir():
        raise GraftError(f"{path} does not name its classes; add classes.txt with a name a line, or data.yaml")
    root = path if path.is_dir() else path.parent
    if names.suffix in (".yaml", ".yml"):
        classes, pictures = _from_yaml(names)
    else:
        classes = tuple(line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip())
        pictures = _from_folders(root)
    if not classes or len(set(classes)) < len(classes):
        raise GraftError(f"{names} has {'a class name twice' if classes else 'no class names'}; name every class once")
    everything = [file for files in pictures.values() for file in files]
    bad = unreadable(everything, strict=check.strict, progress=progress)
    broken = {everything[i] for i in bad}
    parts: dict[str, list[Annotated]] = {}
    without = number = 0
    for part, files in pictures.items():
        parts[part] = []
        for file in files:
            number += 1
            if file not in broken:
                labels = _label_file(file)
                without += not labels.is_file()
                parts[part].append(_record(file, root, labels, number, classes, check))
    if without == len(everything) - len(broken):
        raise GraftError(f"{path}: none of the {without} images has a label file like {_label_file(everything[0])}")
    if without:
        warnings.warn(
            f"{path}: {without} of {len(everything)} images have no label file and count as images without objects",
            stacklevel=3,
        )
    if masks is False or not _outlined(parts):
        parts = {p: [dataclasses.replace(r, shapes=None) for r in listed] for p, listed in parts.items()}
    skipped = tuple(Skipped(str(everything[i]), reason) for i, reason in sorted(bad.items()))
    return DetectionSource(str(path), classes, tuple(range(len(classes))), parts, skipped)


def _from_yaml(file: Path) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise GraftError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict) or "names" not in table or "train" not in table:
        raise GraftError(f"{file} is no YOLO data file; expected the keys names and train")
    names = table["names"]
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise GraftError(f"{file}: names must be numbered 0 to {len(names) - 1}, but has {sorted(names)[:20]}")
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list):
        raise GraftError(f"{file}: names must be a list, or numbers with names, but is {names!r}")
    if table.get("nc", len(names)) != len(names):
        raise GraftError(f"{file}: nc is {table['nc']}, but there are {len(names)} names")
    root = file.parent / str(table.get("path") or "")
    root = root if root.is_dir() else file.parent
    pictures = {p: _listed(table[p], root, file, p) for p in ("train", "val", "test") if table.get(p)}
    return tuple(str(name) for name in names), pictures


def _listed(given: Any, root: Path, file: Path, part: str) -> list[Path]:
    """Pictures of one part: of a folder, of a text file that lists them, or of several of these."""
    found: list[Path] = []
    for entry in given if isinstance(given, list) else [given]:
        where = root / str(entry)
        if not where.exists():
            # Some exports write ../train/images although the folder lies beside the yaml.
            where = root / str(entry).lstrip("./")
        if where.is_dir():
            found += _walk(where)
        elif where.is_file():
            lines = where.read_text(encoding="utf-8").splitlines()
            found += [where.parent / line.strip() for line in lines if line.strip()]
        else:
            raise GraftError(f"{file}: {part} is {entry}, which is not there; looked for {where}")
    missing = [picture for picture in found if not picture.is_file()]
    if missing or not found:
        example = f"{len(missing)} missing images, for example {missing[0]}" if found else "no images"
        raise GraftError(f"{file}: {part} has {example}; correct the list or add them")
    return found


def _from_folders(root: Path) -> dict[str, list[Path]]:
    parts: dict[str, list[Path]] = {}
    for name, part in PART_NAMES.items():
        for folder in (root / "images" / name, root / name / "images"):
            if folder.is_dir():
                if part in parts:
                    raise GraftError(f"{root} has two folders for {part}, one of them {folder}; keep one")
                parts[part] = _walk(folder)
    if not parts and (root / "images").is_dir():
        parts["train"] = _walk(root / "images")
    if "train" not in parts:
        raise GraftError(f"{root} has no images to train on; expected {root}/images or {root}/images/train")
    for part, files in parts.items():
        if not files:
            raise GraftError(f"{root} has no images for {part}; add images or remove the folder")
    pictures = {file.with_suffix("") for files in parts.values() for file in files}
    folders = [root / "labels", *(root / name / "labels" for name in PART_NAMES)]
    for labels in (f for folder in folders if folder.is_dir() for f in sorted(folder.rglob("*.txt"))):
        if labels.name != "classes.txt" and _across(labels.with_suffix(""), "labels", "images") not in pictures:
            raise GraftError(f"{labels} has no image; add the image or remove the file")
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


def _walk(folder: Path) -> list[Path]:
    found = [f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
    return sorted(found, key=lambda f: natural_key(f.as_posix()))


def _label_file(picture: Path) -> Path:
    return _across(picture, "images", "labels").with_suffix(".txt")


def _across(path: Path, here: str, there: str) -> Path:
    """``path`` with its last folder ``here`` named ``there``."""
    pieces = list(path.parts)
    for i in range(len(pieces) - 2, -1, -1):
        if pieces[i] == here:
            pieces[i] = there
            break
    return Path(*pieces)


def _record(
    picture: Path, root: Path, labels: Path, number: int, classes: tuple[str, ...], check: BoxCheck
) -> Annotated:
    height, width = size = picture_size(picture)
    boxes, found, shapes = [], [], []
    lines = labels.read_text(encoding="utf-8", errors="replace").splitlines() if labels.is_file() else []
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{labels} line {row}"
        label, values = _numbers(line, where, classes)
        shape: Shape | None = None
        if len(values) == 4:
            x, y, w, h = values * (width, height, width, height)
            corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        else:
            shape = Polygons((values.reshape(-1, 2) * (width, height),))
            corners = shape.bounds()
        box = check(corners, size, where)
        if box is not None:
            boxes.append(box)
            found.append(label)
            shapes.append(shape)
    array = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    outlines = tuple(s for s in shapes if s is not None)
    area = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    if len(outlines) == len(boxes) and boxes:
        area = np.asarray([s.draw(height, width).sum() for s in outlines], dtype=np.float32)
    return Annotated(
        picture,
        picture.relative_to(root).as_posix() if picture.is_relative_to(root) else picture.as_posix(),
        number,
        size,
        array,
        np.asarray(found, dtype=np.int64),
        area,
        np.zeros(len(boxes), dtype=bool),
        outlines if len(outlines) == len(boxes) else None,
    )


def _numbers(line: str, where: str, classes: tuple[str, ...]) -> tuple[int, np.ndarray]:
    pieces = line.split()
    if len(pieces) != 5 and (len(pieces) < 7 or len(pieces) % 2 == 0):
        raise GraftError(
            f"{where} has {len(pieces)} values; expected class x y width height, or class and the x y of an outline"
        )
    try:
        values = np.asarray([float(piece) for piece in pieces])
    except ValueError as error:
        raise GraftError(f"{where} holds something that is no number: {line.strip()[:60]!r}") from error
    if values[0] not in range(len(classes)):
        raise GraftError(f"{where}: there is no class {pieces[0]}; the {len(classes)} classes are numbered from 0")
    if not ((values[1:] >= -_TOLERANCE) & (values[1:] <= 1 + _TOLERANCE)).all():
        raise GraftError(
            f"{where}: {line.strip()[:60]!r} has coordinates outside 0..1; they are shares of the picture, not pixels"
        )
    return int(values[0]) + 1, values[1:]


def _outlined(parts: dict[str, list[Annotated]]) -> bool:
    """Whether every object of every picture has an outline."""
    records = [record for part in parts.values() for record in part]
    return all(r.shapes is not None for r in records) and any(len(r.labels) for r in records)
