"""LoRA of HF peft against ours on the same layers with the same values: bytes, time, files and switching."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core.adapter import activate
from ..core.checkpoint import WEIGHTS
from ..lean import meter
from .equal import relative
from .goals import Goal
from .hf_peft import give_to_peft
from .memory import OF_PEFT as SAVED_OF_PEFT
from .memory import Memory, measure
from .step_time import TO_PEFT, training_step
from .subjects import Setting, Subject, attach_at, subject

AGREE = 1e-5
"""The largest relative difference of outputs to those of HF peft with the same A, B and head."""
_SWITCHES = 10
"""Switches that are timed as one, there and back again."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of the two libraries, ours once per level.

    Attributes:
        memory: Its bytes.
        seconds: Median time of a training step.
        ratio: Median time of a step relative to HF peft in the same round.
        file: Bytes of the saved tensors, head included.
        switch: Seconds to switch between two adapters that are in memory.
        difference: The largest difference of an output to HF peft's, relative to the largest output.
    """

    memory: Memory
    seconds: float
    ratio: float
    file: int
    switch: float
    difference: float


@dataclasses.dataclass(frozen=True)
class Match:
    """Both libraries on one backbone.

    Attributes:
        setting: Backbone and input.
        rounds: Alternating rounds of the times.
        rows: HF peft first.
    """

    setting: Setting
    rounds: int
    rows: Sequence[Contender]

    def saved_ratio(self, row: Contender) -> float:
        """What ``row`` saves for the backward relative to HF peft."""
        return row.memory.saved / self.rows[0].memory.saved

    def goals(self) -> list[Goal]:
        """The same function with as many trained values, fewer bytes, and no more time."""
        found = []
        for row in self.rows[1:]:
            level = row.memory.level
            found.append(Goal(f"output difference, {level}", row.difference, AGREE))
            found.append(Goal(f"trained / HF peft, {level}", row.memory.trainable / self.rows[0].memory.trainable, 1.0))
            if level == "exact":
                limit = SAVED_OF_PEFT.get(self.setting.model, 1.0)
                found.append(Goal("saved / HF peft, exact", self.saved_ratio(row), limit))
                found.append(Goal("time / HF peft, exact", row.ratio, TO_PEFT, advisory=True))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        rows = [
            {**dataclasses.asdict(r), "saved_ratio": self.saved_ratio(r), "whole": r.memory.whole} for r in self.rows
        ]
        return {**self.setting.to_dict(), "rounds": self.rounds, "rows": rows}


def match(
    setting: Setting,
    levels: Iterable[str] = ("plain", "exact"),
    *,
    rounds: int = 7,
    say: Callable[[str], None] = lambda name: None,
) -> Match:
    """Measure LoRA of both libraries.

    Args:
        setting: Backbone and input; all variants are in memory at once.
        levels: Levels of ours.
        rounds: Alternating rounds of the times.
        say: Called with what is measured next.

    Raises:
        GraftError: It is not known which layers of this backbone get LoRA, or peft is not installed.
    """
    theirs = subject(setting, "peft-lora")
    ours = [subject(setting, "lora", level) for level in levels]
    everyone = {one.label: one for one in (theirs, *ours)}
    for one in ours[:1]:  # the values of all levels are the same
        assert one.adapter is not None
        give_to_peft(one.adapter, theirs.model)
    outputs = {label: one.model(one.image).detach() for label, one in everyone.items()}
    bytes_of = {}
    for label, one in everyone.items():
        say(f"{label}: bytes")
        bytes_of[label] = measure(one)
    say("alternating rounds")
    steps = {label: training_step(one) for label, one in everyone.items()}
    timed = meter.alternating(steps, rounds, meter.clock_of(setting.device))
    say("files and switches")
    files = {label: _file_bytes(one) for label, one in everyone.items()}
    switches = meter.alternating({label: _switching(one) for label, one in everyone.items()}, rounds)
    rows = [
        Contender(
            memory=bytes_of[label],
            seconds=timed[label].seconds,
            ratio=timed[label].ratio,
            file=files[label],
            switch=switches[label].seconds / _SWITCHES,
            difference=relative(outputs[label], outputs[theirs.label]),
        )
        for label in everyone
    ]
    return Match(setting, rounds, rows)


def _file_bytes(one: Subject) -> int:
    with tempfile.TemporaryDirectory() as folder:
        if one.adapter is not None:
            one.adapter.save(folder)
        else:
            one.model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
        return (Path(folder) / WEIGHTS).stat().st_size


def _switching(one: Subject) -> Callable[[], None]:
    """Switches between the adapter and a second one like it, which is added here."""
    model: Any = one.model
    if one.adapter is not None:
        attach_at(model, "lora", one.level, name="second")
    else:
        model.add_adapter("second", model.peft_config["default"])
    switch = model.set_adapter if one.adapter is None else lambda name: activate(model, name)

    def run() -> None:
        for name in itertools.islice(itertools.cycle(("default", "second")), _SWITCHES):
            switch(name)

    return run
