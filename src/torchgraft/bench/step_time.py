"""Time and operations of one training step: every method and level against full fine-tuning, taking turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..lean import meter
from .goals import Goal
from .memory import name_of
from .subjects import PEERS, Setting, Subject, backbone, default_methods, subject

OF_FULL = {"resnet50": 0.70, "efficientnet_lite0": 0.80, "convnext_tiny": 0.80}
"""Backbone -> the largest accepted time of a step relative to full fine-tuning, Conv-Adapter at level exact."""
TO_FLOPS = 1 / 0.9
"""The most that the time ratio may exceed the ratio of operations: a time efficiency of 0.9."""
TO_PEFT = 1.03
"""The most that a step of LoRA at level exact may take of HF peft's; 3 % is what the ratio moves from run to run."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step (forward, backward, AdamW) of one variant.

    Attributes:
        method: Method or peer, in its string form.
        level: Name of the level; empty for peers.
        forward: Operations of the forward, a multiply-add as two.
        backward: Operations of the backward.
        seconds: Median time.
        ratio: Median time relative to full fine-tuning in the same round.
        of_flops: Operations relative to full fine-tuning.
    """

    method: str
    level: str
    forward: int
    backward: int
    seconds: float
    ratio: float
    of_flops: float

    @property
    def efficiency(self) -> float:
        """Which part of the operations that are saved shows in the time: 1 when time falls as operations do."""
        return self.of_flops / self.ratio


@dataclasses.dataclass(frozen=True)
class Race:
    """All variants of one backbone.

    Attributes:
        setting: Backbone and input.
        rounds: Alternating rounds that were timed.
        rows: Full fine-tuning first.
    """

    setting: Setting
    rounds: int
    rows: Sequence[Step]

    def goals(self) -> list[Goal]:
        """What the times are held against; all of it advisory."""
        found = []
        rows = {(name_of(r.method), r.level): r for r in self.rows}
        limit, adapter = OF_FULL.get(self.setting.model), rows.get(("conv-adapter", "exact"))
        if limit and adapter:
            found.append(Goal("time / full, conv-adapter exact", adapter.ratio, limit, advisory=True))
            found.append(Goal("time / operations, conv-adapter exact", 1 / adapter.efficiency, TO_FLOPS, advisory=True))
        lora, peft = rows.get(("lora", "exact")), rows.get(("peft-lora", ""))
        if lora and peft:
            found.append(Goal("time / HF peft, lora exact", lora.ratio / peft.ratio, TO_PEFT, advisory=True))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        rows = [{**dataclasses.asdict(r), "efficiency": r.efficiency} for r in self.rows]
        return {**self.setting.to_dict(), "rounds": self.rounds, "rows": rows}


def race(
    setting: Setting,
    methods: Iterable[str] | None = None,
    levels: Iterable[str] = ("plain", "exact"),
    *,
    rounds: int = 7,
    say: Callable[[str], None] = lambda name: None,
) -> Race:
    """Time a training step of every method at every level, and of the peers, all in the same rounds.

    Args:
        setting: Backbone and input; all variants are in memory at once.
        methods: Methods and peers; None: the peers and what suits the backbone. Full fine-tuning is always timed.
        levels: Names of levels.
        rounds: Alternating rounds.
        say: Called with the name of each variant before it is built.

    Raises:
        GraftError: Whatever attaching raises, or peft is not installed.
    """
    chosen = [*PEERS, *default_methods(backbone(setting))] if methods is None else ["full", *methods]
    subjects: dict[str, Subject] = {}
    for method in dict.fromkeys(chosen):
        for level in [""] if method in PEERS else levels:
            say(f"{method} {level}".strip())
            one = subject(setting, method, level or "plain")
            subjects[one.label] = one
    counts = {label: meter.step_flops(one.loss) for label, one in subjects.items()}
    say("alternating rounds")
    timed = meter.alternating(
        {label: training_step(one) for label, one in subjects.items()}, rounds, meter.clock_of(setting.device)
    )
    full = sum(counts["full"])
    rows = [
        Step(one.method, one.level, *counts[label], *timed[label], sum(counts[label]) / full)
        for label, one in subjects.items()
    ]
    return Race(setting, rounds, rows)


def training_step(one: Subject) -> Callable[[], None]:
    """Forward, backward and AdamW on the subject's batch."""
    optimiser = torch.optim.AdamW(one.trained().values(), lr=1e-5)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        one.loss().backward()
        optimiser.step()

    return step
