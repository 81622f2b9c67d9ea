"""What ``torch.compile`` makes of an adapted model: graph breaks, bytes kept for the backward, time.

The compiler chooses what to keep by itself, but no fewer than what its operators take as arguments: the backward of a
convolution takes the input, frozen weight or not. Lean layers therefore have a compiled form of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..lean.meter import alternating, clock_of, saved_bytes
from .cases import fresh_compiler
from .goals import Goal
from .subjects import Setting, Subject, subject

LIMIT, LIMITS = 1e-3, {"compact": 1e-2}
"""The largest accepted difference of a gradient from that of the eager model, relative to its largest value; compiled,
level compact is exact, so there it is that of the eager model."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant, eager and compiled.

    Attributes:
        method: Method or peer, in its string form.
        level: Name of the level; empty for peers.
        breaks: Graph breaks.
        eager: Bytes that the eager model keeps for the backward.
        compiled: Bytes that the compiled one keeps.
        time: Time of a compiled forward and backward relative to an eager one.
        difference: The largest difference of a gradient, relative to the gradient's largest value.
    """

    method: str
    level: str
    breaks: int
    eager: int
    compiled: int
    time: float
    difference: float

    @property
    def label(self) -> str:
        """Method and level as one name."""
        return f"{self.method} {self.level}".strip()


def measure(
    setting: Setting,
    methods: Iterable[str],
    levels: Iterable[str] = ("plain", "exact"),
    *,
    backend: str = "inductor",
    rounds: int = 5,
    say: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Compile full fine-tuning and every method at every level.

    Args:
        setting: Backbone and input.
        methods: Methods with options.
        levels: Names of levels.
        backend: Backend of ``torch.compile``.
        rounds: Rounds that are timed.
        say: Called with the name of each variant.
    """
    variants = [("full", "plain"), *((method, level) for method in methods for level in levels)]
    rows = []
    for method, level in variants:
        say(f"{method} {level}")
        rows.append(row(subject(setting, method, level), backend=backend, rounds=rounds))
    return rows


def row(one: Subject, *, backend: str, rounds: int) -> Row:
    """Compile one variant and compare it with itself in eager mode."""
    with fresh_compiler():
        breaks = torch._dynamo.explain(one.model)(one.image).graph_break_count
        torch.compiler.reset()
        wanted = one.gradients()
        eager = saved_bytes(one.loss, one.held())
        compiled_model: Any = torch.compile(one.model, backend=backend)
        compiled = dataclasses.replace(one, model=compiled_model)
        found = compiled.gradients()
        kept = saved_bytes(compiled.loss, one.held())
        times = alternating(
            {"eager": lambda: one.loss().backward(), "compiled": lambda: compiled.loss().backward()},
            rounds,
            clock_of(one.image.device),
        )
    return Row(one.method, one.level, breaks, eager, kept, times["compiled"].ratio, _difference(found, wanted))


def goals(rows: list[Row]) -> list[Goal]:
    """No graph breaks under a method, the gradients of the eager model, and no more kept than by plain compiling."""
    ours = [r for r in rows if r.method != "full"]
    found = [Goal(f"graph breaks, {r.label}", r.breaks, 0) for r in ours]
    found += [Goal(f"gradient difference, {r.label}", r.difference, LIMITS.get(r.level, LIMIT)) for r in ours]
    plain = {r.method: r for r in ours if r.level == "plain"}
    found += [
        Goal(f"saved compiled / compiled plain, {r.label}", r.compiled / max(plain[r.method].compiled, 1), 1.0)
        for r in ours
        if r.level != "plain" and r.method in plain
    ]
    return found


def _difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Compiled parameters may be named behind a prefix, but come in the same order."""
    pairs = zip(found.values(), wanted.values(), strict=True)
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)
