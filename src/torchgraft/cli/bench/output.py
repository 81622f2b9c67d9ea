"""How every benchmark command ends: its goals, the JSON line and the exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ..console import emit_json, results_only, say, table

if TYPE_CHECKING:
    from torchgraft.bench.goals import Goal


def conclude(
    command: str,
    payload: dict[str, Any],
    goals: Iterable[Goal] = (),
    *,
    as_json: bool,
    check: bool = False,
    check_times: bool = False,
) -> None:
    """Print the goals and, with ``as_json``, the JSON line; leave with exit code 1 where a goal is missed.

    A command prints its own table before, within ``results_only(as_json)``.

    Args:
        command: Name of the command; the line's ``"bench"``.
        payload: What was measured, as plain data; the rest of the line.
        goals: What the numbers are held against.
        as_json: Print the line.
        check: A missed goal is a failure.
        check_times: A missed advisory goal is a failure too.

    Raises:
        typer.Exit: With code 1, when a goal is missed that counts.
    """
    told = list(goals)
    with results_only(as_json):
        if told:
            say()
            table(("goal", "value", "limit", ""), [_cells(g) for g in told], right=("value", "limit"))
    if as_json:
        emit_json({"bench": command, **payload, "goals": [g.to_dict() for g in told]}, indent=None)
    if any(not g.met and (check_times if g.advisory else check or check_times) for g in told):
        raise typer.Exit(1)


def mib(count: float | None) -> str:
    """Bytes as mebibytes with one digit; empty when there is no number."""
    return "" if count is None else f"{count / 2**20:.1f}"


def ratio(value: float | None) -> str:
    """A ratio with three digits; empty when there is no number."""
    return "" if value is None else f"{value:.3f}"


def _cells(goal: Goal) -> Sequence[str]:
    verdict = "met" if goal.met else "missed (advisory)" if goal.advisory else "MISSED"
    return goal.name, f"{goal.value:.4g}", f"{goal.limit:.4g}", verdict
