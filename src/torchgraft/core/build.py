"""Building: from a method's config to the placements of an adapter, and whether they can act.

Nothing is attached here: ``attach`` installs what is built, ``plan`` counts it, ``load`` compares it with a file.
"""

from __future__ import annotations

import warnings

from ..errors import GraftError
from .anatomy import Anatomy
from .frozen import batchnorm_placements
from .head import HEAD_SLOT, head_paths, head_placements
from .method import Method
from .placements import Placement, Train


def build(
    anatomy: Anatomy, config: Method, *, num_classes: int | None, batchnorm: str, headless: bool = False
) -> list[Placement]:
    """Every placement of an adapter on this anatomy: the method's, the head's, the statistics'.

    ``headless``: the adapter has a head that this model has no place for, so adding nothing else is fine.

    Raises:
        GraftError: The method finds no place, or the model has no classifier to replace.
    """
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise GraftError(f"num_classes={num_classes!r}: expected a whole number of at least 1")
    placed = list(config.placements(anatomy))
    if num_classes is not None:
        heads = head_paths(anatomy)
        replaced = [p for p in placed if any(p.home == h or p.home.startswith(f"{h}.") for h in heads)]
        placed = [p for p in placed if p not in replaced]
        for placement in replaced:
            if not isinstance(placement, Train):
                warnings.warn(
                    f"{config.name}: {placement.kind} at {placement.home!r} makes way for the head", stacklevel=3
                )
        placed += head_placements(anatomy, num_classes)
    _own_once(placed)
    if not placed and not headless:
        raise GraftError(f"{config} adds nothing to this model: no site is selected and num_classes is not given")
    placed += batchnorm_placements(anatomy.model, batchnorm)
    _number_slots(placed)
    return placed


def saved_prefix(anatomy: Anatomy, placement: Placement) -> str:
    """What the names of a placement's tensors begin with in a state and in a file."""
    if placement.slot == HEAD_SLOT:
        return HEAD_SLOT
    return f"{anatomy.address(placement.home)}/{placement.slot}"


def _number_slots(placed: list[Placement]) -> None:
    """Give placements of one name at one module numbers, so that every slot is there once."""
    used: set[tuple[str, str]] = set()
    for placement in placed:
        base, number = placement.slot, 2
        while (placement.home, placement.slot) in used:
            placement.slot, number = f"{base}{number}", number + 1
        used.add((placement.home, placement.slot))


def _own_once(placed: list[Placement]) -> None:
    """Of several copies of one parameter (combined methods) the first stays."""
    taken: set[tuple[str, str]] = set()
    for placement in [p for p in placed if isinstance(p, Train)]:
        placement.give_up([n for n in placement.names if (placement.home, n) in taken])
        taken |= {(placement.home, n) for n in placement.names}
        if not placement.names:
            placed.remove(placement)


def check(anatomy: Anatomy, config: Method, placed: list[Placement]) -> None:
    """Refuse placements at modules that never run, run more than once where order matters, or cannot act.

    Raises:
        GraftError: Names the method, the site and the reason.
    """
    around: set[str] = set()
    for placement in placed:
        support = placement.supports_here(anatomy.module(placement.home))
        for hook in placement.hooks():
            if hook.when == "around" and hook.path in around:
                raise GraftError(f"{config.name}: two placements take the place of {hook.path!r}; only one can")
            around |= {hook.path} if hook.when == "around" else set()
        for hook in placement.hooks():
            if hook.when.startswith("view:") or placement.functional:
                continue
            count = anatomy.calls(hook.path)
            if count == 0:
                raise GraftError(
                    f"{config.name}: site {hook.path!r} is never called in a forward (its parent uses its weights "
                    f"directly, or the input does not reach it), so {placement.kind} would do nothing there; "
                    f"exclude it with exclude={hook.path!r}"
                )
            tapped = getattr(placement, "tap", None) is not None
            if tapped and count > 1:
                raise GraftError(
                    f"{config.name}: site {hook.path!r} is called {count} times in one forward (a shared module), so a "
                    f"tensor cannot be carried to or from it; exclude it with exclude={hook.path!r}"
                )
        if not support.forward:
            raise GraftError(f"{config.name}: site {placement.home!r} cannot take {placement.kind}: {support.reason}")
