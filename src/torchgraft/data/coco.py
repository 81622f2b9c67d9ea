"""COCO json: pictures, boxes and instance masks, with categories numbered as their author liked.

=====================================================  ======================================================
given                                                  read
=====================================================  ======================================================
``annotations.json``                                   that file; val is split off
folder with ``annotations/instances_{train,val}*``     COCO's own layout, pictures in ``train2017/`` and so on
folder with ``{train,valid,test}/*.json``              pictures beside the file
folder with ``{train,val,test}.json`` or a single one  pictures beside the file or in ``images/``
=====================================================  ======================================================

Category ids, which may have gaps, become labels 1..K in ascending order; ``DetectionData.category_ids`` leads back.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GraftError
from .dataset import Skipped
from .detection import Annotated, BoxCheck, DetectionSource, Shape, picture_size
from .folders import PART_NAMES
from .images import ProgressCallback, unreadable
from .shapes import read_polygons, read_rle
from .splits import natural_key

_LISTS = ("images", "annotations", "categories")


def find_coco(path: Path) -> dict[str, Path]:
    """Part -> COCO json, found by the names of files and folders; empty if there is none.

    Raises:
        GraftError: Several files could be the same part.
    """
    if path.is_file():
        return {"train": path} if path.suffix.lower() == ".json" else {}
    found = [f for f in sorted((*path.glob("*.json"), *path.glob("*/*.json"))) if not f.name.startswith(".")]
    if any(f.name.startswith("instances_") for f in found):
        found = [f for f in found if f.name.startswith("instances_")]
    found = [f for f in found if _looks_like_coco(f)]
    parts: dict[str, Path] = {}
    for file in found:
        part = _part_of(file, path) if len(found) > 1 else "train"
        if part is None:
            raise GraftError(
                f"{path} has {len(found)} COCO files and {file.relative_to(path)} does not say which part it is; "
                "name them train, val and test, or give one file"
            )
        if part in parts:
            raise GraftError(
                f"{path} has two COCO files for {part}, {parts[part].relative_to(path)} and {file.relative_to(path)}; "
                "keep one, or give one file"
            )
        parts[part] = file
    if parts and "train" not in parts:
        raise GraftError(f"{path} has COCO files for {' and '.join(parts)} but none for train; add one")
    return {part: parts[part] for part in ("train", "val", "test") if part in parts}


def load_coco(
    path: Path,
    check: BoxCheck,
    *,
    images: Path | None = None,
    masks: bool | None = None,
    progress: ProgressCallback | None = None,
) -> DetectionSource:
    """Read COCO files.

    Args:
        path: A json file, or a folder as in the table of this module.
        check: What is done with boxes at the border and without area.
        images: Where the pictures are; default beside the file, see the table.
        masks: Whether to read instance masks; default if every object has one.
        progress: Told how far the check of the pictures is.

    Raises:
        GraftError: A file is no COCO json, an entry is wrong or a picture is missing; the message names it.
    """
    files = find_coco(path)
    if not files:
        raise GraftError(f"{path} holds no COCO json; expected a file with {', '.join(_LISTS)}")
    tables = {part: _read(file) for part, file in files.items()}
    categories = _categories(files["train"], tables["train"])
    for part, file in files.items():
        for number, name in _categories(file, tables[part]).items():
            if categories.get(number) != name:
                raise GraftError(
                    f"{file}: category {number} is {name!r}, but {files['train']} has "
                    f"{categories.get(number, 'no such category')!r}; use the same categories in every file"
                )
    if masks is None:
        masks = all(a.get("segmentation") for table in tables.values() for a in table["annotations"])
    labels = {number: label for label, number in enumerate(categories, start=1)}
    parts: dict[str, list[Annotated]] = {}
    skipped: list[Skipped] = []
    for part, file in files.items():
        parts[part], bad = _records(file, tables[part], labels, check, images=images, masks=masks, progress=progress)
        skipped += bad
    return DetectionSource(str(path), tuple(categories.values()), tuple(categories), parts, tuple(skipped))


def _looks_like_coco(file: Path) -> bool:
    """Judge by the first and the last letters, since a file may have hundreds of megabytes."""
    with file.open("rb") as handle:
        head = handle.read(1 << 16)
        handle.seek(max(0, file.stat().st_size - (1 << 16)))
        text = head + handle.read()
    lists, fields = (b'"annotations"', b'"images"'), (b'"categories"', b'"category_id"', b'"bbox"')
    named = file.name.startswith("instances_")
    return named or (any(key in text for key in lists) and any(key in text for key in fields))


def _part_of(file: Path, root: Path) -> str | None:
    """The part that a file's name, or else its folder's, speaks of."""
    names = [*re.split(r"[^a-z]+", file.stem.lower())]
    if file.parent != root:
        names.append(file.parent.name.lower())
    return next((PART_NAMES[name] for name in names if name in PART_NAMES), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        table = json.loads(text) if text.strip() else None
    except OSError as error:
        raise GraftError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise GraftError(f"{file} is no json: {error}") from error
    if table is None:
        raise GraftError(f"{file} is empty; expected a COCO json with {', '.join(_LISTS)}")
    lacking = [k for k in _LISTS if not isinstance(table, dict) or not isinstance(table.get(k), list)]
    if lacking:
        holds = f"holds {', '.join(list(table)[:5])}" if isinstance(table, dict) else f"holds a {type(table).__name__}"
        raise GraftError(f"{file} is no COCO json: it lacks the list {lacking[0]!r} and {holds}")
    for key, needed in (("images", ("id", "file_name")), ("annotations", ("image_id", "category_id", "bbox"))):
        for position, entry in enumerate(table[key]):
            gone = [n for n in needed if not isinstance(entry, dict) or n not in entry]
            if gone:
                raise GraftError(f"{file}: entry {position} of {key} has no {gone[0]}; expected {', '.join(needed)}")
    for key in ("images", "annotations"):
        if not table[key]:
            raise GraftError(f"{file} has an empty list of {key}; there is nothing to learn or measure")
    return table


def _categories(file: Path, table: dict[str, Any]) -> dict[int, str]:
    """Category id -> name, in ascending order of the id."""
    found: dict[int, str] = {}
    for position, entry in enumerate(table["categories"]):
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(number, int) or not isinstance(name, str):
            raise GraftError(f"{file}: entry {position} of categories needs a whole number id and a name")
        if number in found or name in found.values():
            raise GraftError(f"{file}: category {number}, {name!r}, is there twice; keep one")
        found[number] = name
    if not found:
        raise GraftError(f"{file} has no categories; add at least one")
    return dict(sorted(found.items()))


def _records(
    file: Path,
    table: dict[str, Any],
    labels: dict[int, int],
    check: BoxCheck,
    *,
    images: Path | None,
    masks: bool,
    progress: ProgressCallback | None,
) -> tuple[list[Annotated], list[Skipped]]:
    entries = sorted(table["images"], key=lambda e: natural_key(str(e["file_name"])))
    by_image: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        if not isinstance(entry["id"], int) or entry["id"] in by_image:
            raise GraftError(f"{file}: the image id {entry['id']!r} is there twice or is no whole number")
        by_image[entry["id"]] = []
    for position, annotation in enumerate(table["annotations"]):
        where = _where(file, annotation, position)
        if annotation["image_id"] not in by_image:
            raise GraftError(f"{where}: there is no image {annotation['image_id']}; add it or remove the annotation")
        if annotation["category_id"] not in labels:
            raise GraftError(
                f"{where}: there is no category {annotation['category_id']}; categories are {list(labels)[:20]}"
            )
        by_image[annotation["image_id"]].append(annotation | {"where": where})
    paths = _pictures(file, [str(e["file_name"]) for e in entries], images)
    bad = unreadable(paths, strict=check.strict, progress=progress)
    records: list[Annotated] = []
    for i, (entry, path) in enumerate(zip(entries, paths, strict=True)):
        if i in bad:
            continue
        size = picture_size(path)
        said = (entry.get("height", size[0]), entry.get("width", size[1]))
        if said != size:
            raise GraftError(
                f"{file}: image {entry['id']} is said to be {said[1]}x{said[0]} pixels, but {path} has "
                f"{size[1]}x{size[0]} when upright; correct the json or the picture"
            )
        records.append(_record(path, entry, size, by_image[entry["id"]], labels, check, masks))
    return records, [Skipped(str(paths[i]), reason) for i, reason in sorted(bad.items())]


def _record(
    path: Path,
    entry: dict[str, Any],
    size: tuple[int, int],
    annotations: list[dict[str, Any]],
    labels: dict[int, int],
    check: BoxCheck,
    masks: bool,
) -> Annotated:
    boxes, found, area, crowd = [], [], [], []
    shapes: list[Shape] = []
    for annotation in annotations:
        where = annotation["where"]
        try:
            x, y, width, height = (float(v) for v in annotation["bbox"])
        except (TypeError, ValueError) as error:
            raise GraftError(f"{where}: bbox is {annotation['bbox']}; expected x, y, width, height") from error
        box = check((x, y, x + width, y + height), size, where)
        if box is None:
            continue
        shape = _shape(annotation.get("segmentation"), size, where) if masks else None
        if shape is not None:
            shapes.append(shape)
        boxes.append(box)
        found.append(labels[annotation["category_id"]])
        crowd.append(bool(annotation.get("iscrowd", 0)))
        stated = annotation.get("area")
        if stated is None:
            stated = shape.draw(*size).sum() if shape is not None else (box[2] - box[0]) * (box[3] - box[1])
        if not isinstance(stated, (int, float, np.number)) or not np.isfinite(stated) or stated < 0:
            raise GraftError(f"{where}: area is {stated!r}; expected square pixels, or leave it out")
        area.append(float(stated))
    return Annotated(
        path,
        str(entry["file_name"]),
        entry["id"],
        size,
        np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        np.asarray(found, dtype=np.int64),
        np.asarray(area, dtype=np.float32),
        np.asarray(crowd, dtype=bool),
        tuple(shapes) if masks else None,
    )


def _shape(given: Any, size: tuple[int, int], where: str) -> Shape:
    if not given:
        raise GraftError(f"{where}: no segmentation, but instance masks are asked for; add it or ask for boxes")
    return read_polygons(given, where) if isinstance(given, list) else read_rle(given, size, where)


def _where(file: Path, annotation: dict[str, Any], position: int) -> str:
    return f"{file}: annotation {annotation['id']}" if "id" in annotation else f"{file}: annotation entry {position}"


def _pictures(file: Path, names: list[str], images: Path | None) -> list[Path]:
    """The pictures' files, in the first folder that holds any of them."""
    beside = file.parent
    tail = file.stem.removeprefix("instances_")
    folders = [beside, beside / "images", beside / tail, beside / "images" / tail]
    folders += [beside.parent / tail, beside.parent / "images" / tail, beside.parent / "images", beside.parent]
    if images is not None:
        folders = [images, images / tail]
    for folder in folders:
        paths = [folder / name for name in names]
        missing = [path for path in paths if not path.is_file()]
        if len(missing) < len(paths):
            break
    else:
        looked = ", ".join(str(f) for f in folders[:4])
        raise GraftError(f"{file}: none of its {len(names)} images is there, like {names[0]}; looked in {looked}")
    if missing:
        raise GraftError(
            f"{file}: {len(missing)} of {len(names)} images are missing, for example {missing[0]}; "
            "add them or remove their entries"
        )
    return paths
