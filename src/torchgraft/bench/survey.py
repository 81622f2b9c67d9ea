"""What is known of every method without training it: paper, placements, merging, layer kinds, sizes.

All of it is asked of the methods themselves: each is built on reference backbones that hold no data.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import timm
import torch

from ..core import Anatomy, Method, anatomy
from ..core import method as resolve
from ..core.layers import kind_of
from ..core.placements import Placement
from ..errors import GraftError

REFERENCE = {
    "resnet50": "resnet50",
    "convnext_tiny": "convnext_tiny",
    "vit_base": "vit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
"""Short name of a reference backbone -> its name in timm."""


@dataclass(frozen=True)
class Facts:
    """One method.

    Attributes:
        name: Its name in the registry.
        summary: First sentence of its documentation.
        paper: Where it was published: an arXiv number, or the venue; empty for methods that everybody uses.
        placements: Kinds of placements on the reference backbones.
        merge: ``yes``, ``no``, or ``partly`` where some of its placements fold into the weights.
        layers: Kinds of the layers it acts at.
        parameters: Reference backbone -> trainable values without a head, or why the method does not apply.
    """

    name: str
    summary: str
    paper: str
    placements: tuple[str, ...]
    merge: str
    layers: tuple[str, ...]
    parameters: dict[str, int | str]


def survey(specs: Iterable[str], *, say: Callable[[str], None] = lambda name: None) -> list[Facts]:
    """The facts of some methods.

    Args:
        specs: Methods in their string form.
        say: Called with the name of each method before it is built.
    """
    found = []
    for spec in specs:
        say(spec)
        found.append(_facts(resolve(spec)))
    return found


def _facts(config: Method) -> Facts:
    parameters: dict[str, int | str] = {}
    kinds: dict[str, None] = {}
    layers: dict[str, None] = {}
    merges: list[bool] = []
    for short in REFERENCE:
        here = _reference(short)
        try:
            placed = _built(config, here)
        except GraftError as error:
            parameters[short] = str(error).partition(":")[2].strip()
            continue
        unique = {id(p): p.numel() for placement in placed for p in placement.parameters()}
        parameters[short] = sum(unique.values())
        kinds |= dict.fromkeys(p.kind for p in placed)
        layers |= dict.fromkeys(kind_of(here.module(p.home)) for p in placed)
        merges += [p.supports_here(here.module(p.home)).merge for p in placed]
    told = sys.modules[type(config).__module__].__doc__ or ""
    text = told.split("\n\n")[0]
    return Facts(
        name=str(config),
        summary=" ".join(text.split()),
        paper=_paper(told),
        placements=tuple(kinds),
        merge="yes" if merges and all(merges) else "partly" if any(merges) else "no" if merges else "nothing to merge",
        layers=tuple(layers),
        parameters=parameters,
    )


def _built(config: Method, here: Anatomy) -> list[Placement]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config.placements(here)


def _paper(text: str) -> str:
    """The arXiv number that comes first, else the venue that the first paragraph names."""
    number = re.search(r"arXiv:? ?(\d{4}\.\d{4,5})", text)
    if number:
        return f"arXiv {number[1]}"
    first = text.split("\n\n")[0]
    venue = re.search(r"\b(CVPR|ICCV|ECCV|ICLR|ICML|NeurIPS|ACL|EMNLP|AAAI)\b[^,;)]*", first)
    return venue[0].strip() if venue else ""


@functools.cache
def _reference(short: str) -> Anatomy:
    with torch.device("meta"):
        return anatomy(timm.create_model(REFERENCE[short], num_classes=0))
