"""Folders of pictures and masks, for segmentation.

=============================================  ==============================================================
layout                                         read
=============================================  ==============================================================
``images/`` + ``masks/``                       pairs by name; parts are folders inside them or around them.
                                               Also ``imgs``, ``annotations``, ``labels``, ``annotation``
``images/training``, ``annotations/training``  ADE20K: 0 is ignored and class k of the file is class k - 1
``leftImg8bit/`` + ``gtFine/``                 Cityscapes: ``_labelTrainIds``, else ``_labelIds`` as train ids
=============================================  ==============================================================

A mask holds class numbers, as a palette or as plain grey values. Names come from ``classes.txt``, one a line;
without it the classes are numbered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import GraftError
from .dataset import Skipped
from .detection import picture_size
from .folders import PART_NAMES
from .images import IMAGE_SUFFIXES, ProgressCallback, unreadable
from .segmentation import IGNORE_INDEX, SegmentationDataset, SegmentationSource, read_mask
from .splits import natural_key

CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""The 19 classes that are evaluated, in the order of their train ids, with their ids in ``_labelIds`` files.
Source: Cordts et al., The Cityscapes Dataset (https://arxiv.org/abs/1604.01685)."""

_PAIRS = [(i, m) for i in ("images", "imgs") for m in ("masks", "annotations", "labels", "annotation")]
_MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm"})
_PARTS = PART_NAMES | {"training": "train"}


@dataclass(frozen=True)
class Pair:
    """A picture and its mask."""

    image: Path
    mask: Path


def find_pairs(root: Path) -> dict[str, tuple[Path, Path]]:
    """Part -> (folder of pictures, folder of masks), by the layouts of this module; empty if there are none."""
    for images, masks in [("leftImg8bit", "gtFine"), *_PAIRS]:
        found: dict[str, tuple[Path, Path]] = {}
        for name, part in _PARTS.items():
            for a, b in ((root / images / name, root / masks / name), (root / name / images, root / name / masks)):
                if a.is_dir() and _has_masks(b):
                    found.setdefault(part, (a, b))
        if not found and (root / images).is_dir() and _has_masks(root / masks):
            found["train"] = (root / images, root / masks)
        if found:
            return {part: found[part] for part in ("train", "val", "test") if part in found}
    return {}


def load_masks(
    root: Path, *, ignore_index: int = IGNORE_INDEX, strict: bool = False, progress: ProgressCallback | None = None
) -> SegmentationSource:
    """Read pictures and masks.

    Args:
        root: The folder.
        ignore_index: The value that stands for pixels that do not count.
        strict: Refuse pictures that cannot be read, instead of leaving them out.
        progress: Told how far the check of the pictures is.

    Raises:
        GraftError: A picture or mask has no partner or another size, or a mask holds a value that is no class.
    """
    folders = find_pairs(root)
    if "train" not in folders:
        raise GraftError(f"{root} has no pictures with masks to train on; expected {root}/images and {root}/masks")
    cityscapes = folders["train"][1].is_relative_to(root / "gtFine")
    ade20k = folders["train"][1].name == "training"
    pairs = {part: _paired(images, masks, cityscapes) for part, (images, masks) in folders.items()}
    everything = [pair for listed in pairs.values() for pair in listed]
    bad = unreadable([pair.image for pair in everything], strict=strict, progress=progress)
    broken = {everything[i].image for i in bad}
    pairs = {part: [pair for pair in listed if pair.image not in broken] for part, listed in pairs.items()}
    raw_ids = cityscapes and everything[0].mask.name.endswith("_labelIds.png")
    names = tuple(CITYSCAPES) if cityscapes else _names(root)
    mapping = np.full(1 << 16, -1, dtype=np.int64)
    if raw_ids:
        # Every other id of Cityscapes is one that its authors leave out of the evaluation.
        mapping[:] = ignore_index
        mapping[list(CITYSCAPES.values())] = np.arange(len(CITYSCAPES))
    elif names is not None:
        mapping[: len(names) + ade20k] = np.arange(len(names) + ade20k) - ade20k
    present, palette = _scan(pairs, mapping if raw_ids or names else None, ignore_index, ade20k)
    if names is None:
        known = present - {ignore_index} - ({0} if ade20k else set())
        count = max(known, default=-1) + (0 if ade20k else 1)
        if count < 2:
            raise GraftError(
                f"the masks in {folders['train'][1]} hold only {sorted(present)}, where {ignore_index} means ignored; "
                "two classes are needed: number them from 0, or give another ignore_index"
            )
        names = tuple(f"class {k}" for k in range(count))
        mapping[: count + ade20k] = np.arange(count + ade20k) - ade20k
    if ignore_index == IGNORE_INDEX < len(names):
        raise GraftError(f"{root} has {len(names)} classes, but 255 means ignored; give another ignore_index")
    if not raw_ids:
        mapping[ignore_index] = ignore_index
    if ade20k:
        mapping[0] = ignore_index
        palette = palette[1:] if palette else None
    parts = {
        part: SegmentationDataset(
            [p.image for p in listed],
            [p.mask for p in listed],
            [p.image.relative_to(root).as_posix() for p in listed],
            mapping,
            ignore_index,
        )
        for part, listed in pairs.items()
    }
    skipped = tuple(Skipped(str(everything[i].image), reason) for i, reason in sorted(bad.items()))
    colours = palette[: len(names)] if palette and len(palette) >= len(names) else None
    return SegmentationSource(str(root), names, colours, ignore_index, parts, skipped)


def _has_masks(folder: Path) -> bool:
    return folder.is_dir() and any(f.suffix.lower() in _MASK_SUFFIXES for f in folder.rglob("*"))


def _names(root: Path) -> tuple[str, ...] | None:
    file = root / "classes.txt"
    if not file.is_file():
        return None
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(names) < 2 or len(set(names)) < len(names):
        raise GraftError(f"{file} has {len(names)} names; at least two different ones are needed, one a line")
    return names


def _paired(images: Path, masks: Path, cityscapes: bool) -> list[Pair]:
    pictures = _by_name(images, IMAGE_SUFFIXES)
    drawn = _by_name(masks, _MASK_SUFFIXES)
    if cityscapes:
        pictures = {name.removesuffix("_leftImg8bit"): file for name, file in pictures.items()}
        kinds = ("_gtFine_labelTrainIds", "_gtFine_labelIds")
        kind = next((k for k in kinds if any(name.endswith(k) for name in drawn)), kinds[1])
        drawn = {name.removesuffix(kind): file for name, file in drawn.items() if name.endswith(kind)}
    for has, lacks, what, partner, where in (
        (pictures, drawn, "image", "mask", masks),
        (drawn, pictures, "mask", "image", images),
    ):
        alone = [file for name, file in has.items() if name not in lacks]
        if alone:
            raise GraftError(
                f"{len(alone)} of {len(has)} {what}s have no {partner}, for example {alone[0]}; "
                f"add {where}/{next(n for n in has if n not in lacks)}.png or remove the {what}"
            )
    return [Pair(pictures[name], drawn[name]) for name in sorted(pictures, key=natural_key)]


def _by_name(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    """Path below ``folder`` without its ending -> file."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in suffixes and not file.name.startswith("."):
            name = file.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise GraftError(f"{found[name]} and {file} have the same name; keep one of them")
            found[name] = file
    return found


def _scan(
    pairs: dict[str, list[Pair]], mapping: np.ndarray | None, ignore_index: int, ade20k: bool
) -> tuple[set[int], tuple[tuple[int, int, int], ...] | None]:
    """Read every mask: the values that occur, and the first palette."""
    present: set[int] = set()
    palette = None
    for pair in (pair for listed in pairs.values() for pair in listed):
        values, colours = read_mask(pair.mask)
        height, width = picture_size(pair.image)
        if values.shape != (height, width):
            raise GraftError(
                f"the mask {pair.mask} has {values.shape[1]}x{values.shape[0]} pixels, but {pair.image} has "
                f"{width}x{height}; save them at the same size"
            )
        found = set(np.flatnonzero(np.bincount(values.ravel())).tolist())
        unknown = sorted(found - {ignore_index} - ({0} if ade20k else set()))
        unknown = [] if mapping is None else [value for value in unknown if mapping[value] < 0]
        if unknown:
            pixels = int((values == unknown[0]).sum())
            raise GraftError(
                f"the mask {pair.mask} holds the value {unknown[0]} in {pixels} pixels, which is no class; "
                f"add it to classes.txt, or use {ignore_index} for pixels to ignore"
            )
        present |= found
        palette = palette or colours
    return present, palette
