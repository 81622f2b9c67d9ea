"""Class-folder trees: ``root/CLASS/...`` or ``root/{train,val,test}/CLASS/...``.

A class is a folder; pictures may lie at any depth below it. Names that start with a dot and files that are no
pictures are ignored. Classes are numbered in natural order (``item9`` before ``item10``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import GraftError
from .dataset import FilePictures, ImageDataset, Skipped, Source
from .images import IMAGE_SUFFIXES, ProgressCallback, unreadable
from .splits import natural_key

PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folder or column value (lower case) -> part."""


def load_folder(
    root: Path, *, strict: bool = False, progress: ProgressCallback | None = None, name: str | None = None
) -> Source:
    """Read a class-folder tree.

    Args:
        root: The folder.
        strict: Refuse files that cannot be read, instead of leaving them out.
        progress: Told how far the check of the files is.
        name: What to call the data; default the path.

    Raises:
        GraftError: The tree is empty, cannot be read, has no train part, has a class without a single
            readable picture, or has a class in val or test that train does not know.
    """
    folders = _part_folders(root)
    classes = _class_names(folders["train"], root)
    listings = {part: _listing(part, folder, classes, root) for part, folder in folders.items()}
    return checked_source(
        name or str(root), root, classes, listings, strict=strict, progress=progress, what="class folder"
    )


@dataclass(frozen=True)
class Listed:
    """A picture that a folder or a table names."""

    path: Path
    id: str
    label: int


def checked_source(
    name: str,
    root: Path,
    classes: tuple[str, ...],
    listings: dict[str, list[Listed]],
    *,
    strict: bool,
    progress: ProgressCallback | None,
    what: str,
) -> Source:
    """Check every listed file and build the parts from those that can be read.

    Args:
        name: What to call the data.
        root: Where the data lie, for error messages.
        classes: Class names, indexed by label.
        listings: Part -> its pictures, in a stable order.
        strict: Refuse files that cannot be read.
        progress: Told how far the check is.
        what: What a class is called in error messages: ``"class folder"`` or ``"label"``.

    Raises:
        GraftError: Nothing readable is left of a class in train, or ``strict`` and a file cannot be read.
    """
    everything = [item for items in listings.values() for item in items]
    bad = unreadable([item.path for item in everything], strict=strict, progress=progress)
    skipped = tuple(Skipped(str(everything[i].path), reason) for i, reason in sorted(bad.items()))
    if everything and len(bad) == len(everything):
        raise GraftError(
            f"none of the {len(everything)} images in {root} can be read, for example "
            f"{skipped[0].path}: {skipped[0].reason}"
        )
    parts: dict[str, ImageDataset] = {}
    position = 0
    for part, items in listings.items():
        good = [item for i, item in enumerate(items, start=position) if i not in bad]
        position += len(items)
        parts[part] = ImageDataset(
            FilePictures([item.path for item in good]),
            [item.label for item in good],
            [item.id for item in good],
        )
    gone = sorted(set(range(len(classes))) - set(parts["train"].labels))
    if gone:
        reasons = [s for i, s in zip(sorted(bad), skipped, strict=True) if everything[i].label == gone[0]]
        example = f"; for example {reasons[0].path}: {reasons[0].reason}" if reasons else ""
        raise GraftError(
            f"the {what} {classes[gone[0]]!r} in {root} has no readable image to train on{example}; "
            "add images or remove the class"
        )
    return Source(name, classes, parts, skipped)


def _part_folders(root: Path) -> dict[str, Path]:
    """Part -> folder. A tree without part folders is one train part."""
    subfolders = _subfolders(root)
    if not subfolders:
        raise GraftError(f"{root} has no class folders; expected {root}/CLASS/IMAGES or {root}/train/CLASS/IMAGES")
    named = [f for f in subfolders if f.name.lower() in PART_NAMES]
    parts: dict[str, Path] = {}
    for folder in named:
        part = PART_NAMES[folder.name.lower()]
        if part in parts:
            raise GraftError(f"{root} has two {part} folders, {parts[part].name} and {folder.name}; keep one")
        parts[part] = folder
    if "train" in parts:
        return {part: parts[part] for part in ("train", "val", "test") if part in parts}
    if len(named) == len(subfolders):
        raise GraftError(
            f"{root} has {' and '.join(f.name for f in named)} but no train folder; expected {root}/train/CLASS/IMAGES"
        )
    return {"train": root}


def _class_names(train: Path, root: Path) -> tuple[str, ...]:
    names = tuple(f.name for f in _subfolders(train))
    if not names:
        raise GraftError(f"{train} has no class folders; expected {train}/CLASS/IMAGES")
    if len(names) == 1:
        raise GraftError(
            f"{root} has a single class folder, {names[0]!r}; at least two classes are needed to tell apart"
        )
    return names


def _listing(part: str, folder: Path, classes: tuple[str, ...], root: Path) -> list[Listed]:
    listed: list[Listed] = []
    for class_folder in _subfolders(folder):
        if class_folder.name not in classes:
            raise GraftError(
                f"{class_folder} is a class that the train folder does not have; "
                f"add it to train or remove it from {part}"
            )
        paths = _pictures(class_folder)
        if not paths:
            raise GraftError(
                f"the class folder {class_folder} holds no images (of the kinds "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}); add images or remove the folder"
            )
        label = classes.index(class_folder.name)
        listed += [Listed(p, p.relative_to(root).as_posix(), label) for p in paths]
    return listed


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise GraftError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    return [folder / n for n in sorted(names, key=natural_key)]


def _pictures(folder: Path) -> list[Path]:
    """Every picture below ``folder``, in natural order of the path."""

    def refuse(error: OSError) -> None:
        raise GraftError(f"cannot read the folder {error.filename}: {error.strerror or error}") from error

    found: list[Path] = []
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # Followed links may lead back up; a folder is entered once.
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=natural_key)
        found += [Path(where, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found, key=lambda p: natural_key(p.as_posix()))
