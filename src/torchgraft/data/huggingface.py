"""Image classification data sets of the Hugging Face hub, through the optional package ``datasets``."""

from __future__ import annotations

import importlib.util
from typing import Any

from PIL import Image

from ..backbones.network import failure_reason
from ..errors import GraftError
from .dataset import ImageDataset, Source

_PARTS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}


class HubPictures:
    """The pictures in one column of a hub data set."""

    def __init__(self, table: Any, column: str) -> None:
        self.table = table
        self.column = column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Image.Image:
        return self.table[index][self.column]


def load_huggingface(repo: str) -> Source:
    """Load ``REPO`` or ``REPO/CONFIG`` style names as ``datasets.load_dataset`` takes them.

    The picture column and the label column are recognised by their types, ``Image`` and ``ClassLabel``.

    Raises:
        GraftError: The package is missing, the data set cannot be had, or it has no such columns.
    """
    if importlib.util.find_spec("datasets") is None:
        raise GraftError(f"hf:{repo} needs the package datasets, which is not installed; run: pip install datasets")
    import datasets

    try:
        tables = datasets.load_dataset(repo)
    except Exception as error:
        raise GraftError(f"hf:{repo} cannot be loaded: {failure_reason(error)}") from error
    parts: dict[str, ImageDataset] = {}
    classes: tuple[str, ...] = ()
    for split, table in tables.items():
        if split not in _PARTS:
            continue
        image = next((n for n, f in table.features.items() if isinstance(f, datasets.Image)), None)
        label = next((n for n, f in table.features.items() if isinstance(f, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise GraftError(
                f"hf:{repo} has no column of type {'Image' if image is None else 'ClassLabel'}; its columns "
                f"are {', '.join(table.features)}"
            )
        classes = classes or tuple(table.features[label].names)
        ids = [f"{repo}/{split}/{i:06d}" for i in range(len(table))]
        parts[_PARTS[split]] = ImageDataset(HubPictures(table, image), table[label], ids)
    if "train" not in parts:
        raise GraftError(f"hf:{repo} has no train split; its splits are {', '.join(tables)}")
    return Source(f"hf:{repo}", classes, parts)
