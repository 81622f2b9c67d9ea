"""One function from a short spec to a classification task.

======================  =============================================================================
spec                    data
======================  =============================================================================
``photos/``             class folders: ``CLASS/IMAGES``, or ``{train,val,test}/CLASS/IMAGES``
``labels.csv``          a table with the header ``path,label`` or ``path,label,split``
``sample:NAME?o=v``     real or generated pictures out of an installed package, see ``list_samples``
``tv:NAME?o=v``         a torchvision data set by its class name
``hf:REPO``             a data set of the Hugging Face hub (needs the package ``datasets``)
======================  =============================================================================

Parts. What the source calls val selects models and what it calls test is reported. A folder or table without
val has one split off train, seeded and stratified. Published data sets with two parts keep the second one as
test. Samples bring a train, a val and a test part of their own; ``val_fraction`` does not apply to them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import GraftError, nearest
from .dataset import ClassificationData, ImageDataset, Source
from .folders import load_folder
from .huggingface import load_huggingface
from .images import ProgressCallback
from .samples import SAMPLES, load_sample
from .splits import few_shot, hold_out
from .tables import load_csv
from .torchvision_sets import load_torchvision

PREFIXES = ("sample", "tv", "hf")


def load_data(
    spec: str | os.PathLike[str],
    *,
    seed: int = 0,
    shots: int | None = None,
    strict: bool = False,
    val_fraction: float = 0.2,
    progress: ProgressCallback | None = None,
) -> ClassificationData:
    """Load the pictures of a classification task.

    Args:
        spec: A class-folder tree, a CSV file, ``sample:NAME``, ``tv:NAME`` or ``hf:REPO``; options follow as
            ``?option=value&option=value``.
        seed: Moves what is drawn at random: the split-off val part, the shots, the training part of a sample.
        shots: Keep this many training images per class; val and test stay whole.
        strict: Refuse a folder or table with files that cannot be read; otherwise they are left out and
            listed in ``skipped``.
        val_fraction: Share of train that becomes val where the source has no val part.
        progress: Called with (files done, files in all) while folders and tables are checked; without it a
            bar is drawn when the error stream is a terminal.

    Returns:
        The task. Its ``train.ids`` say which images were drawn.

    Raises:
        GraftError: The data cannot be used as they are; the message says what to do.
    """
    source = _open(os.fspath(spec), seed, strict, progress)
    if len(source.classes) < 2:
        raise GraftError(
            f"{source.name} has {len(source.classes)} class; at least two classes are needed to tell apart"
        )
    for part, pictures in source.parts.items():
        if len(pictures) == 0:
            raise GraftError(f"the {part} part of {source.name} has no images; add images or remove the part")
    train, val = _train_and_val(source, seed, val_fraction)
    if shots is not None:
        train = train.subset(few_shot(train.labels, shots, seed, classes=source.classes))
    return ClassificationData(
        name=source.name,
        classes=source.classes,
        train=train,
        val=val,
        test=source.parts.get("test"),
        skipped=source.skipped,
        licence=source.licence,
        mirror=source.mirror,
    )


def _train_and_val(source: Source, seed: int, val_fraction: float) -> tuple[ImageDataset, ImageDataset]:
    train = source.parts["train"]
    if "val" in source.parts:
        return train, source.parts["val"]
    stay, off = hold_out(train.labels, val_fraction, seed, classes=source.classes)
    return train.subset(stay), train.subset(off)


def _open(spec: str, seed: int, strict: bool, progress: ProgressCallback | None) -> Source:
    prefix, _, rest = spec.partition(":")
    if prefix in PREFIXES and rest:
        if prefix == "sample":
            return load_sample(rest, seed=seed)
        if prefix == "tv":
            return load_torchvision(rest)
        return load_huggingface(rest)
    path = Path(spec).expanduser()
    if path.is_dir():
        return load_folder(path, strict=strict, progress=progress, name=spec)
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return load_csv(path, strict=strict, progress=progress)
        raise GraftError(
            f"{spec} is a file, but only CSV files with the header path,label are read; "
            "give a folder of class folders or a .csv file"
        )
    raise GraftError(
        f"no data at {spec!r}: expected a folder of class folders, a .csv file, sample:NAME, tv:NAME or "
        f"hf:REPO; {nearest(spec, _candidates(spec, path))}"
    )


def _candidates(spec: str, path: Path) -> list[str]:
    """What a mistaken spec may have meant: the samples, and what lies beside the path that does not exist."""
    options = [f"sample:{name}" for name in SAMPLES]
    if not re.match(r"[a-z]{2,}:", spec) and path.parent.is_dir():
        options += [str(beside) for beside in sorted(path.parent.iterdir())[:1000]]
    return options
