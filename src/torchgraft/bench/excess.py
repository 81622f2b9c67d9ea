"""What each level keeps against the floor, and which layers keep more than they have to."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from ..lean.meter import saved_tensors
from .floor import Floor, floor, layer_label
from .goals import Goal
from .steps import Running
from .subjects import Setting, Subject, subject

LIMIT, LIMITS = 1.05, {"efficientnet_lite0": 1.08}
"""The largest accepted ratio of what level exact keeps to the floor, and where it is another one."""


@dataclasses.dataclass(frozen=True)
class Reached:
    """What one level keeps.

    Attributes:
        level: Its name.
        tensors: Path of the module that was running when a storage was kept first, and its bytes.
        beyond: By class of layer, what has no counterpart of the same size in the floor, and what of the floor has
            none here. Layers of one block may keep for each other, so counterparts are looked for in the same module
            first, then around it.
    """

    level: str
    tensors: tuple[tuple[str, int], ...]
    beyond: dict[str, tuple[int, int]]

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(size for _, size in self.tensors)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The floor of a method on a backbone, and what levels keep.

    Attributes:
        setting: Backbone and input.
        method: The method in its string form.
        floor: The floor.
        reached: One entry per level.
    """

    setting: Setting
    method: str
    floor: Floor
    reached: tuple[Reached, ...]

    def ratio(self, reached: Reached) -> float:
        """What is kept relative to the floor; infinite where nothing has to be kept."""
        return reached.bytes / self.floor.bytes if self.floor.bytes else float("inf" if reached.bytes else 1)

    def goals(self) -> list[Goal]:
        """Level exact is held to the floor."""
        limit = LIMITS.get(self.setting.model, LIMIT)
        exact = [r for r in self.reached if r.level == "exact"]
        return [Goal(f"saved / floor, {self.method} exact", self.ratio(r), limit) for r in exact]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        levels = {r.level: {"bytes": r.bytes, "ratio": self.ratio(r), "beyond": r.beyond} for r in self.reached}
        return {
            **self.setting.to_dict(),
            "method": self.method,
            "floor": {"bytes": self.floor.bytes, "parts": self.floor.parts(), "layers": self.floor.layers()},
            "levels": levels,
        }


def compare(
    setting: Setting,
    method: str,
    levels: Iterable[str] = ("plain", "exact"),
    *,
    fake: bool = False,
    say: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Count the floor of a method and measure what it keeps at every level.

    Args:
        setting: Backbone and input.
        method: A method with options.
        levels: Names of levels.
        fake: Measure on tensors without data, in a moment; the floor is always counted on such.
        say: Called with what is done next.

    Raises:
        GraftError: Whatever attaching raises.
    """
    say("floor")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ghost = subject(setting, method).ghost(mode)
    with mode:
        needed = floor(ghost.model, ((ghost.image,), {}))
    reached = []
    for level in levels:
        say(level)
        reached.append(reach(subject(setting, method, level), needed, fake=fake))
    return Comparison(setting, method, needed, tuple(reached))


def reach(one: Subject, needed: Floor, *, fake: bool = False) -> Reached:
    """What one variant keeps for the backward of its outputs, and which layers keep more than is needed."""
    if fake:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        ghost = one.ghost(mode)
        with mode:
            return reach(ghost, needed)
    running = Running()
    with running.of(one.model):
        kept = saved_tensors(lambda: one.model(one.image), one.held(), label=lambda: running.path)
    tensors = [(t.label, t.bytes) for t in kept if t.bytes]
    more, less = unmatched(tensors, [(e.path, e.bytes) for e in needed.entries])
    sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for side, left in enumerate((more, less)):
        for path, size in left:
            sums[layer_label(one.model, path)][side] += size
    order = sorted(sums, key=lambda name: sums[name][1] - sums[name][0])
    return Reached(one.level, tuple(tensors), {name: (sums[name][0], sums[name][1]) for name in order})


Sized = list[tuple[str, int]]
"""Paths and sizes."""


def unmatched(kept: Sized, needed: Sized) -> tuple[Sized, Sized]:
    """What is left of both when entries of one size are paired: at one path first, then in ever larger parts."""
    deepest = max((path.count(".") + 1 for path, _ in (*kept, *needed)), default=0)
    for cut in range(deepest + 1):
        pool: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
        for number, (path, size) in enumerate(needed):
            pool[_around(path, cut), size].append(number)
        paired: set[int] = set()
        left = []
        for path, size in kept:
            if partners := pool[_around(path, cut), size]:
                paired.add(partners.pop())
            else:
                left.append((path, size))
        kept, needed = left, [entry for number, entry in enumerate(needed) if number not in paired]
    return kept, needed


def _around(path: str, cut: int) -> str:
    """The path without its last ``cut`` parts."""
    parts = path.split(".")
    return ".".join(parts[: max(len(parts) - cut, 0)])
