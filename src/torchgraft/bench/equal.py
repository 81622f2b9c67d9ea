"""Equality: what the levels and folding change of gradients and outputs. Levels that promise nothing change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .goals import Goal
from .subjects import Setting, Subject, subject

PROMISES = {"exact": 0.0, "recompute": 0.0, "checkpoint": 0.0, "compact": 1e-2}
"""Level -> the largest relative difference of a gradient to the folded model without lean layers."""
FOLDING = 1e-5
"""The largest relative difference of outputs that folding BatchNorm into its convolution may make."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One level against the same model without it.

    Attributes:
        level: The level; ``folded`` is folding alone, against the model as it is usually coded.
        gradient: The largest ||a - b|| / ||b|| of all trained tensors; 0 means that all bits are equal.
        where: Name of the tensor with that difference; empty when there is none.
        output: The largest |a - b| of the outputs, relative to the largest |b|.
    """

    level: str
    gradient: float
    where: str
    output: float


@dataclasses.dataclass(frozen=True)
class Equality:
    """All levels of one method.

    Attributes:
        setting: Backbone and input.
        method: The method in its string form.
        rows: Folding first.
    """

    setting: Setting
    method: str
    rows: Sequence[Difference]

    def goals(self) -> list[Goal]:
        """The promises of the levels."""
        found = []
        for row in self.rows:
            if row.level == "folded":
                found.append(Goal("output, folding", row.output, FOLDING))
            else:
                limit = PROMISES[row.level]
                found.append(Goal(f"gradient, {row.level}", row.gradient, limit))
                found.append(Goal(f"output, {row.level}", row.output, limit))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**self.setting.to_dict(), "method": self.method, "rows": [dataclasses.asdict(r) for r in self.rows]}


def differences(
    setting: Setting,
    method: str,
    levels: Iterable[str] = tuple(PROMISES),
    *,
    say: Callable[[str], None] = lambda name: None,
) -> Equality:
    """Compare outputs and the gradient of every trained tensor.

    Levels are compared with the folded model without lean layers, folding with the model as it is usually coded.

    Args:
        setting: Backbone and input.
        method: A method with options.
        levels: Names of levels.
        say: Called with the name of each level before it is run.

    Raises:
        GraftError: Whatever attaching raises.
    """
    say("plain")
    plain = _run(subject(setting, method, "plain"))
    say("folded")
    folded = _run(subject(setting, method, "folded"))
    rows = [_difference("folded", folded, plain)]
    for level in levels:
        say(level)
        rows.append(_difference(level, _run(subject(setting, method, level)), folded))
    return Equality(setting, method, rows)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| relative to the largest |b|; 0 only when all bits that count are equal."""
    return _ratio((a - b).abs().max(), b.abs().max())


def _run(one: Subject) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients; whatever a method draws at random is the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(one.target.numel())
        out = one.model(one.image).detach()
        torch.manual_seed(one.target.numel())
        return out, one.gradients()


def _difference(
    level: str, found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> Difference:
    worst, where = 0.0, ""
    for name, reference in expected[1].items():
        gradient = found[1][name]
        size = _ratio(torch.linalg.vector_norm(gradient - reference), torch.linalg.vector_norm(reference))
        if not size <= worst:  # a nan is worse than any number
            worst, where = size, name
    return Difference(level, worst, where, relative(found[0], expected[0]))


def _ratio(difference: Tensor, size: Tensor) -> float:
    return 0.0 if difference == 0 else float(difference.double() / size.double())
