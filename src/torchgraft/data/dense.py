"""From a path to a detection or segmentation task.

===============  =============================================================  ==================
task             what is there                                                  read by
===============  =============================================================  ==================
detection        a COCO json, or a folder with one for every part               ``coco.py``
detection        ``images/`` + ``labels/*.txt``, ``data.yaml``                  ``yolo.py``
segmentation     ``images/`` + ``masks/``, ADE20K and Cityscapes layouts        ``masks.py``
segmentation     a COCO json with instance masks, when asked for                ``coco.py``
classification   a table, or folders of pictures                                ``load.py``
===============  =============================================================  ==================

The parts follow the rules of classification: train, val and test as the source gives them; without val a seeded
share of train is split off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import GraftError
from .coco import find_coco, load_coco
from .detection import BoxCheck, DetectionData, DetectionDataset
from .images import IMAGE_SUFFIXES, ProgressCallback
from .masks import find_pairs, load_masks
from .segmentation import IGNORE_INDEX, SegmentationData, SegmentationDataset
from .splits import hold_out
from .yolo import find_yolo, load_yolo

Task = Literal["classification", "detection", "segmentation"]


def load_detection(
    path: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    masks: bool | None = None,
    seed: int = 0,
    strict: bool = False,
    val_fraction: float = 0.2,
    progress: ProgressCallback | None = None,
) -> DetectionData:
    """Load the pictures and boxes of a detection task.

    Args:
        path: A COCO json or a folder, see this module's table.
        images: Folder of the pictures of a COCO json; default beside it.
        masks: Whether targets have instance masks; default if every object has one.
        seed: Moves the val part where it is split off.
        strict: Refuse boxes that reach over the border, boxes without area and pictures that cannot be read.
            Otherwise the former are clipped and dropped, with a warning that counts them, and the latter are
            left out and listed in ``skipped``.
        val_fraction: Share of train that becomes val where the source has no val part.
        progress: Called with (files done, files in all) while the pictures are checked.

    Raises:
        GraftError: The data cannot be used as they are; the message names file and entry.
    """
    where = _existing(path)
    check = BoxCheck(strict)
    if find_yolo(where) is not None:
        if images is not None:
            raise GraftError(f"images={os.fspath(images)!r} is for a COCO json, but {where} is a YOLO folder")
        source = load_yolo(where, check, masks=masks, progress=progress)
    elif find_coco(where):
        source = load_coco(
            where, check, images=Path(images) if images is not None else None, masks=masks, progress=progress
        )
    else:
        raise GraftError(f"{where} holds no detection data; give a COCO json, or images/ with labels/*.txt")
    for part, records in source.parts.items():
        if not any(len(record.labels) for record in records):
            raise GraftError(f"the {part} part of {where} has no box in {len(records)} images; annotate some")
    check.report(str(where))
    has_masks = all(record.shapes is not None for records in source.parts.values() for record in records)
    if masks and not has_masks:
        raise GraftError(f"{where} has boxes but not an outline for every object; leave masks off")
    parts = {part: DetectionDataset(records) for part, records in source.parts.items()}
    train = parts["train"]
    val = parts.get("val")
    if val is None:
        stay, off = _split([int(len(record.labels) > 0) for record in train.records], val_fraction, seed, where)
        train, val = train.subset(stay), train.subset(off)
    return DetectionData(
        name=os.fspath(path),
        classes=source.classes,
        train=train,
        val=val,
        test=parts.get("test"),
        category_ids=source.category_ids,
        has_masks=has_masks,
        skipped=source.skipped,
        clipped=check.clipped,
        dropped=check.dropped,
    )


def load_segmentation(
    path: str | os.PathLike[str],
    *,
    ignore_index: int = IGNORE_INDEX,
    seed: int = 0,
    strict: bool = False,
    val_fraction: float = 0.2,
    progress: ProgressCallback | None = None,
) -> SegmentationData:
    """Load the pictures and masks of a segmentation task.

    Args:
        path: A folder, see :mod:`torchgraft.data.masks`, or a COCO json whose objects have masks; what lies
            beside the objects becomes a class of its own.
        ignore_index: The value of mask pixels that do not count, 0..65535.
        seed: Moves the val part where it is split off.
        strict: Refuse pictures that cannot be read; otherwise they are left out and listed in ``skipped``.
        val_fraction: Share of train that becomes val where the source has no val part.
        progress: Called with (files done, files in all) while the pictures are checked.

    Raises:
        GraftError: The data cannot be used as they are; the message names the file.
    """
    if not 0 <= ignore_index < 1 << 16:
        raise GraftError(f"ignore_index={ignore_index}: give a value of a mask's pixels, 0 to 65535")
    where = _existing(path)
    if not find_pairs(where) and find_coco(where):
        data = load_detection(path, masks=True, seed=seed, strict=strict, val_fraction=val_fraction, progress=progress)
        return _painted(data, ignore_index)
    source = load_masks(where, ignore_index=ignore_index, strict=strict, progress=progress)
    train = source.parts["train"]
    val = source.parts.get("val")
    if val is None:
        stay, off = _split([0] * len(train), val_fraction, seed, where)
        train, val = train.subset(stay), train.subset(off)
    return SegmentationData(
        name=os.fspath(path),
        classes=source.classes,
        palette=source.palette,
        ignore_index=ignore_index,
        train=train,
        val=val,
        test=source.parts.get("test"),
        skipped=source.skipped,
    )


def detect_task(path: str | os.PathLike[str]) -> Task | None:
    """What the data at ``path`` are for, judged by the names of files and folders.

    Returns:
        The task, or None where nothing known is there.
    """
    where = Path(path).expanduser()
    if where.is_file():
        if where.suffix.lower() == ".csv":
            return "classification"
        return "detection" if where.suffix.lower() in (".json", ".yaml", ".yml") else None
    if not where.is_dir():
        return None
    if find_yolo(where) is not None or find_coco(where):
        return "detection"
    if find_pairs(where):
        return "segmentation"
    depths = ("*/*", "*/*/*")
    pictures = (f for depth in depths for f in where.glob(depth) if f.suffix.lower() in IMAGE_SUFFIXES)
    return "classification" if next(pictures, None) is not None else None


def _painted(data: DetectionData, ignore_index: int) -> SegmentationData:
    classes = ("unlabelled" if "background" in data.classes else "background", *data.classes)
    if ignore_index < len(classes):
        raise GraftError(
            f"ignore_index={ignore_index} is one of the {len(classes)} classes of {data.name}; give a larger one"
        )

    def painted(part: DetectionDataset) -> SegmentationDataset:
        files = [record.path for record in part.records]
        return SegmentationDataset(files, part.records, part.ids, np.arange(len(classes)), ignore_index)

    return SegmentationData(
        name=data.name,
        classes=classes,
        palette=None,
        ignore_index=ignore_index,
        train=painted(data.train),
        val=painted(data.val),
        test=None if data.test is None else painted(data.test),
        skipped=data.skipped,
    )


def _existing(path: str | os.PathLike[str]) -> Path:
    where = Path(path).expanduser()
    if not where.exists():
        raise GraftError(f"no data at {os.fspath(path)!r}; give a folder or a COCO json")
    return where


def _split(kinds: list[int], fraction: float, seed: int, where: Path) -> tuple[list[int], list[int]]:
    """Indices to train and to validate on, each with its share of every kind unless a kind has a single picture."""
    if len(kinds) < 2:
        raise GraftError(
            f"{where} has {len(kinds)} readable image, but one to train on and one to validate on are needed; "
            "add images or give a val part"
        )
    alone = any(kinds.count(kind) == 1 for kind in set(kinds))
    return hold_out([0] * len(kinds) if alone else kinds, fraction, seed)
