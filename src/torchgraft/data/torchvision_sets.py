"""Torchvision's classification data sets by class name, all behind one shape.

Torchvision has three conventions: a ``train`` flag, a ``split`` word, or no parts at all. The constructor's
signature tells them apart, and the table below only says which words a ``split`` takes. A data set with two
parts keeps the second one as test.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torchvision.datasets
from PIL import Image

from ..backbones.network import failure_reason, network_patience
from ..errors import GraftError, nearest
from .dataset import ImageDataset, Source
from .options import check_options, split_options

_NO_SPLIT_WORD: dict[str, str] = {}
_TWO = {"train": "train", "test": "test"}
_THREE = {"train": "train", "val": "val", "test": "test"}
_VAL_HELD_OUT = {"train": "train", "test": "val"}

SETS: dict[str, dict[str, str]] = {
    "CIFAR10": _NO_SPLIT_WORD,
    "CIFAR100": _NO_SPLIT_WORD,
    "CLEVRClassification": _VAL_HELD_OUT,
    "Caltech101": _NO_SPLIT_WORD,
    "Caltech256": _NO_SPLIT_WORD,
    "Country211": {"train": "train", "val": "valid", "test": "test"},
    "DTD": _THREE,
    "EMNIST": _NO_SPLIT_WORD,
    "EuroSAT": _NO_SPLIT_WORD,
    "FER2013": _TWO,
    "FGVCAircraft": _THREE,
    "FakeData": _NO_SPLIT_WORD,
    "FashionMNIST": _NO_SPLIT_WORD,
    "Flowers102": _THREE,
    "Food101": _TWO,
    "GTSRB": _TWO,
    "ImageNet": _VAL_HELD_OUT,
    "Imagenette": _VAL_HELD_OUT,
    "KMNIST": _NO_SPLIT_WORD,
    "MNIST": _NO_SPLIT_WORD,
    "OxfordIIITPet": {"train": "trainval", "test": "test"},
    "PCAM": _THREE,
    "Places365": {"train": "train-standard", "test": "val"},
    "QMNIST": _NO_SPLIT_WORD,
    "RenderedSST2": _THREE,
    "SEMEION": _NO_SPLIT_WORD,
    "STL10": _TWO,
    "SUN397": _NO_SPLIT_WORD,
    "SVHN": _TWO,
    "StanfordCars": _TWO,
    "USPS": _NO_SPLIT_WORD,
}
"""Part -> the word for it, for the data sets that torchvision asks for by ``split``."""

_HANDED = frozenset({"EMNIST", "GTSRB", "KMNIST", "MNIST", "QMNIST", "RenderedSST2", "SEMEION", "SVHN", "USPS"})
"""Characters, text and signs: a mirrored picture does not keep its label."""

_OURS = frozenset(
    {"self", "root", "train", "transform", "target_transform", "transforms", "loader", "download", "kwargs"}
)


class TorchvisionPictures:
    """The pictures of a torchvision data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image.Image:
        return self.dataset[index][0]


def load_torchvision(text: str) -> Source:
    """Load ``NAME?option=value``; the options are the constructor's own, for example ``DTD?partition=2``.

    The files are looked for under the folder in the environment variable ``TORCHGRAFT_DATA``, by default
    ``~/.cache/torchgraft/data``, and downloaded when they are not there.

    Raises:
        GraftError: The data set or an option does not exist, or its files cannot be had.
    """
    name, given = split_options(text, f"tv:{text}")
    if name not in SETS:
        raise GraftError(f"tv:{name}: torchvision has no classification data set of this name; {nearest(name, SETS)}")
    build = getattr(torchvision.datasets, name)
    accepted = _parameters(build)
    ours = _OURS | ({"split"} if SETS[name] else set())
    check_options(given, sorted(accepted - ours), f"tv:{name}")
    options: dict[str, Any] = {option: _literal(value) for option, value in given.items()}
    if name == "EMNIST":
        options.setdefault("split", "balanced")

    if SETS[name]:
        arguments: dict[str, dict[str, Any]] = {part: {"split": word} for part, word in SETS[name].items()}
    elif "train" in accepted:
        arguments = {"train": {"train": True}, "test": {"train": False}}
    else:
        arguments = {"train": {}}
    parts: dict[str, ImageDataset] = {}
    classes: tuple[str, ...] = ()
    for part, extra in arguments.items():
        dataset = _build(name, build, accepted, {**options, **extra})
        labels = _labels(name, dataset)
        classes = classes or _classes(dataset, labels)
        ids = [f"{name}/{part}/{i:06d}" for i in range(len(labels))]
        parts[part] = ImageDataset(TorchvisionPictures(dataset), labels, ids)
    return Source(f"tv:{text}", classes, parts, mirror=name not in _HANDED)


def data_folder() -> Path:
    """Where downloaded data sets are kept."""
    return Path(os.environ.get("TORCHGRAFT_DATA") or "~/.cache/torchgraft/data").expanduser()


def _parameters(build: type) -> set[str]:
    """The names that a constructor takes, those that it hands on to its base class included."""
    names: set[str] = set()
    for base in build.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        names |= set(parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def _build(name: str, build: Callable[..., Any], accepted: set[str], arguments: dict[str, Any]) -> Any:
    root = data_folder()
    if "root" in accepted:
        arguments = {**arguments, "root": str(root)}
    fetch = {"download": False} if "download" in accepted else {}
    try:
        return build(**arguments, **fetch)
    except (ValueError, TypeError) as error:
        raise GraftError(f"tv:{name}: {' '.join(str(error).split())}") from error
    except ImportError as error:
        raise GraftError(f"tv:{name}: {error}") from error
    except (RuntimeError, OSError) as error:
        if not fetch:
            raise GraftError(
                f"tv:{name} cannot be downloaded automatically ({failure_reason(error)}); put its files "
                f"under {root}, as torchvision.datasets.{name}(root={str(root)!r}) expects them"
            ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        with network_patience():
            return build(**arguments, download=True)
    except Exception as error:
        raise GraftError(
            f"tv:{name}: the download failed ({failure_reason(error)}); put its files under {root} by hand, "
            "as "
            f"torchvision.datasets.{name}(root={str(root)!r}) expects them, or point TORCHGRAFT_DATA at a "
            "folder that has them"
        ) from error


def _labels(name: str, dataset: Any) -> list[int]:
    """The label of every picture, without decoding pictures where the data set keeps a list."""
    labels: Sequence[Any] | None = None
    for attribute in ("targets", "labels", "_labels", "y"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            break
        labels = None
    if labels is None:
        samples = getattr(dataset, "_samples", None)
        if samples is not None and len(samples) == len(dataset):
            labels = [sample[1] for sample in samples]
        else:
            labels = [dataset[i][1] for i in range(len(dataset))]
    # QMNIST keeps a row of details per picture, the class first.
    if name == "QMNIST":
        labels = [row[0] for row in labels]
    return [int(label) for label in labels]


def _classes(dataset: Any, labels: list[int]) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    count = max(labels, default=-1) + 1
    if names is None or len(names) < count:
        return tuple(str(k) for k in range(count))
    return tuple(n if isinstance(n, str) else ", ".join(n) for n in names)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
