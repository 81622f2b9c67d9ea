"""Drawing subsets: stratified hold-out and few-shot selection, repeatable and independent of file order.

Every class draws from its own random stream, keyed by the seed and the class index, and takes a prefix of one
permutation. So the images of a 2-shot selection are among those of the 4-shot selection with the same seed,
and more images in one class do not move the choice in another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ..errors import GraftError

_FEW_SHOT, _HOLD_OUT = 0, 1


def few_shot(labels: Sequence[int], shots: int, seed: int, *, classes: Sequence[str] | None = None) -> list[int]:
    """Draw ``shots`` images of every class.

    Args:
        labels: Class index of every image, in an order that does not depend on the file system.
        shots: Images per class; at least 1.
        seed: Draws another selection.
        classes: Class names, for the error message.

    Returns:
        Indices into ``labels``, ascending.

    Raises:
        GraftError: A class has fewer than ``shots`` images.
    """
    if shots < 1:
        raise GraftError(f"shots={shots}: the number of images per class must be at least 1")
    chosen: list[int] = []
    for label, members in _by_class(labels):
        if len(members) < shots:
            name = classes[label] if classes is not None else label
            raise GraftError(
                f"class {name!r} has {len(members)} training image{'s' if len(members) > 1 else ''}, fewer "
                f"than shots={shots}; use shots={len(members)} or less, or add images"
            )
        chosen += _shuffled(members, seed, label, _FEW_SHOT)[:shots]
    return sorted(chosen)


def hold_out(
    labels: Sequence[int], fraction: float, seed: int, *, classes: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Split off ``fraction`` of every class, at least one image and never all of them.

    Args:
        labels: Class index of every image, in an order that does not depend on the file system.
        fraction: Share to split off, between 0 and 1.
        seed: Draws another split.
        classes: Class names, for the error message.

    Returns:
        Indices that stay and indices that are split off, both ascending.

    Raises:
        GraftError: The fraction is not between 0 and 1, or a class has a single image.
    """
    if not 0 < fraction < 1:
        raise GraftError(f"val_fraction={fraction}: the share of validation images must be between 0 and 1")
    stay: list[int] = []
    off: list[int] = []
    for label, members in _by_class(labels):
        if len(members) == 1:
            name = classes[label] if classes is not None else label
            raise GraftError(
                f"class {name!r} has 1 training image, but one to train on and one to validate on are "
                "needed; add images or give a val part"
            )
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        shuffled = _shuffled(members, seed, label, _HOLD_OUT)
        off += shuffled[:count]
        stay += shuffled[count:]
    return sorted(stay), sorted(off)


def natural_key(name: str) -> tuple[object, ...]:
    """Sort key that puts ``img9`` before ``img10``; equal but for case falls back to the plain order."""
    pieces = re.split(r"([0-9]+)", name.casefold())
    return (tuple(int(p) if i % 2 else p for i, p in enumerate(pieces)), name)


def _by_class(labels: Sequence[int]) -> list[tuple[int, list[int]]]:
    array = np.asarray(labels, dtype=np.int64)
    return [(int(c), np.flatnonzero(array == c).tolist()) for c in np.unique(array)]


def _shuffled(members: list[int], seed: int, label: int, purpose: int) -> list[int]:
    if seed < 0:
        raise GraftError(f"seed={seed}: a seed must not be negative")
    # RandomState's stream is frozen by numpy's compatibility policy, default_rng's is not.
    return np.random.RandomState([seed, label, purpose]).permutation(members).tolist()
