"""What keeping the frozen prefix is worth: training steps by first trained stage, from images and from what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import attach
from ..core.blocks import find_stages
from ..core.prefix import Cut, find_cut, from_cut, until_cut
from ..errors import GraftError
from ..lean import meter
from .goals import Goal
from .step_time import training_step
from .subjects import CLASSES, LEVELS, Setting, Subject, backbone, subject

OF_FULL = {
    "resnet50": {"stages[1:]": 0.58, "stages[2:]": 0.40, "stages[3:]": 0.16, "head": 0.001},
}
"""Backbone -> first trained part -> the largest accepted time of a step from the cut relative to full fine-tuning."""
HEAD = "head"
"""The first trained part of a linear probe."""
IMAGE_BYTES = 3
"""Bytes of a pixel of the image that the cache takes the place of."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Training from one stage on.

    Attributes:
        first: The stage, or ``head`` for a linear probe.
        cut: The boundary that is kept, in words.
        bytes_per_image: What is kept of an image, in float16.
        of_image: That relative to the image as 8-bit RGB.
        saved: Bytes kept for the backward of the batch, from images.
        saved_cached: Likewise from the cut.
        plain: Time of a step from images, relative to full fine-tuning.
        cached: Time of a step from the cut, relative to full fine-tuning.
        error: ||a - b|| / ||b|| of the whole gradient a that comes of float16.
        exact: Whether every gradient has the very same bits when float32 is what is kept.
    """

    first: str
    cut: str
    bytes_per_image: int
    of_image: float
    saved: int
    saved_cached: int
    plain: float
    cached: float
    error: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """All starts of one backbone.

    Attributes:
        setting: Backbone and input.
        method: The method in its string form.
        rounds: Alternating rounds that were timed.
        full: Seconds of a step of full fine-tuning.
        rows: By first trained part, the earliest first.
        refused: First trained part -> why nothing can be kept below it.
    """

    setting: Setting
    method: str
    rounds: int
    full: float
    rows: Sequence[Start]
    refused: dict[str, str]

    def goals(self) -> list[Goal]:
        """The gradients are held to be the same; the times against what was measured before."""
        found = [Goal(f"changed gradients from float32, {r.first}", float(not r.exact), 0.0) for r in self.rows]
        limits = OF_FULL.get(self.setting.model, {})
        times = [(r, limits[r.first]) for r in self.rows if r.first in limits]
        return found + [Goal(f"time / full, {r.first} from the cut", r.cached, at, advisory=True) for r, at in times]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        rows = [dataclasses.asdict(r) for r in self.rows]
        held = {"method": self.method, "rounds": self.rounds, "full_seconds": self.full, "refused": self.refused}
        return {**self.setting.to_dict(), **held, "rows": rows}


def prefixes(
    setting: Setting,
    method: str = "conv-adapter[reduction=4]",
    level: str = "exact",
    *,
    rounds: int = 5,
    say: Callable[[str], None] = lambda name: None,
) -> Prefixes:
    """Time a step of training from each stage on, from images and from the cut, and of full fine-tuning.

    Args:
        setting: Backbone and input; all variants are in memory at once.
        method: A method with options.
        level: Name of a level.
        rounds: Alternating rounds.
        say: Called with what is being prepared.

    Raises:
        GraftError: Whatever attaching raises.
    """
    full = subject(setting, "full")
    steps = {"full": training_step(full)}
    starts: dict[str, _Ready] = {}
    refused: dict[str, str] = {}
    for first in _first_parts(setting):
        say(f"{method} from {first}")
        one = _from_part(setting, method, level, first)
        try:
            starts[first] = _Ready(one, find_cut(one.model, ((one.image[:1],), {})))
        except GraftError as error:
            refused[first] = str(error)
            continue
        steps[first], steps[f"{first} kept"] = training_step(one), starts[first].step()
    say("alternating rounds")
    timed = meter.alternating(steps, rounds, meter.clock_of(setting.device))
    pixels = IMAGE_BYTES * setting.image_size**2
    rows = [
        ready.row(first, timed[first].ratio, timed[f"{first} kept"].ratio, pixels) for first, ready in starts.items()
    ]
    return Prefixes(setting, method, rounds, timed["full"].seconds, rows, refused)


class _Ready:
    """A subject, its cut and what is kept of its batch."""

    def __init__(self, one: Subject, cut: Cut) -> None:
        self.subject, self.cut = one, cut
        with until_cut(one.model, cut) as prefix:
            self.rows = cut.to_rows(prefix(one.image), torch.float32)
        # Before anything is timed: the steps leave gradients behind.
        whole = one.gradients()
        exact, half = (self._gradients(dtype) for dtype in (torch.float32, torch.float16))
        self.exact = all(torch.equal(exact[name], whole[name]) for name in whole)
        a, b = (torch.cat([g[name].flatten() for name in whole]) for g in (half, whole))
        self.error = float((a - b).norm() / b.norm())

    def step(self) -> Callable[[], None]:
        """A training step from float16."""
        kept = self._kept(torch.float16)
        step = training_step(dataclasses.replace(self.subject, image=kept))

        def from_kept() -> None:
            with from_cut(self.subject.model, self.cut):
                step()

        return from_kept

    def row(self, first: str, plain: float, cached: float, pixels: int) -> Start:
        """The numbers of this start."""
        each = self.cut.bytes_per_image(torch.float16)
        kept = self._kept(torch.float16)
        own = self.subject.held()
        saved = meter.saved_bytes(self.subject.loss, own)
        with from_cut(self.subject.model, self.cut):
            saved_cached = meter.saved_bytes(dataclasses.replace(self.subject, image=kept).loss, [*own, kept])
        return Start(
            first,
            str(self.cut),
            each,
            each / pixels,
            saved,
            saved_cached,
            plain,
            cached,
            self.error,
            self.exact,
        )

    def _kept(self, dtype: torch.dtype) -> Tensor:
        return self.cut.from_rows(self.rows.to(dtype))

    def _gradients(self, dtype: torch.dtype) -> dict[str, Tensor]:
        with from_cut(self.subject.model, self.cut):
            return dataclasses.replace(self.subject, image=self._kept(dtype)).gradients()


def _first_parts(setting: Setting) -> list[str]:
    """Every stage but the first, or the quarters of a network of one stage; and the classifier alone."""
    stages = find_stages(backbone(setting))
    if len(stages) > 1:
        return [*(f"stages[{number}:]" for number in range(1, len(stages))), HEAD]
    count = sum(len(stage.blocks) for stage in stages)
    return [*(f"blocks[{count * quarter // 4}:]" for quarter in (1, 2, 3) if count >= 4), HEAD]


def _from_part(setting: Setting, method: str, level: str, first: str) -> Subject:
    """The backbone with a method on the stages from ``first`` on, and the batch of full fine-tuning."""
    whole = subject(setting, "linear")
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        model = backbone(setting)
        probe = first == HEAD
        name = "linear" if probe else method
        options: dict[str, Any] = {} if probe else {"include": first}
        adapter = attach(model, name, num_classes=CLASSES, **options, **LEVELS[level])
    return dataclasses.replace(whole, method=name, level=level, model=model, adapter=adapter)
