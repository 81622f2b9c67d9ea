"""Accuracy against trainable parameters: the table of a grid of runs, and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from ..tasks.plots import LIGHT, Theme, blank, dress
from .grid import Outcome


@dataclass(frozen=True)
class Score:
    """What one method reached on one backbone, over tasks and seeds.

    Attributes:
        method: Method in its string form.
        parameters: What it trains on average over the tasks, without the heads.
        tasks: Task -> (mean, sample standard deviation, number of seeds) of the test accuracy in [0, 1]; the
            deviation is zero for one seed.
        refused: Why it does not apply; then there are no tasks.
    """

    method: str
    parameters: float
    tasks: dict[str, tuple[float, float, int]]
    refused: str = ""

    @property
    def mean(self) -> float:
        """Mean of the tasks' means."""
        return statistics.fmean(mean for mean, _, _ in self.tasks.values()) if self.tasks else 0.0


def scores(outcomes: Iterable[Outcome], tasks: Sequence[str]) -> list[Score]:
    """One score per method that has at least one run of every task, best first; refused ones at the end."""
    by_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_method.setdefault(outcome.cell.method, []).append(outcome)
    found = []
    for method, runs in by_method.items():
        refused = next((r.refused for r in runs if r.refused), "")
        if refused:
            found.append(Score(method, 0.0, {}, refused))
            continue
        accuracies = {task: [r.accuracy for r in runs if r.cell.data == task] for task in tasks}
        if all(accuracies.values()):
            parameters = statistics.fmean(r.parameters for r in runs)
            found.append(Score(method, parameters, {task: _spread(a) for task, a in accuracies.items()}))
    return sorted(found, key=lambda s: (bool(s.refused), -s.mean, s.method))


def front(found: Iterable[Score]) -> list[Score]:
    """The scores that no other beats in accuracy at fewer or as many parameters, from small to large."""
    best: list[Score] = []
    for score in sorted((s for s in found if s.tasks), key=lambda s: (s.parameters, -s.mean)):
        if not best or score.mean > best[-1].mean:
            best.append(score)
    return best


def table(found: Sequence[Score], tasks: Sequence[str]) -> str:
    """The scores as a Markdown table: per cent, mean and deviation over seeds."""
    heads = [task.removeprefix("sample:") for task in tasks]
    lines = [f"| method | parameters | {' | '.join(heads)} | mean |", "|---|---:|" + "---:|" * (len(heads) + 1)]
    for score in found:
        if score.refused:
            continue
        cells = [_cell(*score.tasks[task]) for task in tasks]
        lines.append(f"| `{score.method}` | {score.parameters:,.0f} | {' | '.join(cells)} | {100 * score.mean:.1f} |")
    return "\n".join(lines)


def picture(found: Sequence[Score], *, title: str, footer: str, theme: Theme = LIGHT) -> Figure:
    """Mean accuracy over the tasks against trainable parameters, with the front that no method beats.

    Args:
        found: Scores of one backbone.
        title: What is shown.
        footer: Small print: backbone, tasks, seeds.
        theme: Colours.
    """
    figure = blank(10.0, 6.2, theme)
    axes = figure.add_axes((0.08, 0.13, 0.89, 0.76))
    dress(axes, theme, title)
    drawn = [s for s in found if s.tasks]
    best = front(drawn)
    # A logarithm has no zero: what trains nothing but the head is drawn at the left edge.
    left = min((s.parameters for s in drawn if s.parameters), default=1.0) / 3
    places = {s.method: (s.parameters or left, s.mean) for s in drawn}
    for score in drawn:
        on_front = score in best
        colour = theme.second if on_front else theme.first
        axes.scatter(*places[score.method], s=42, zorder=3, marker="D" if on_front else "o", color=colour)
    line = [places[s.method] for s in best]
    axes.step([x for x, _ in line], [y for _, y in line], where="post", color=theme.second, linewidth=1.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("trainable parameters without the head (the linear probe, at the left, has none)", color=theme.ink)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("test accuracy, mean of the tasks", color=theme.ink)
    _label(axes, places, {s.method: theme.ink if s in best else theme.muted for s in drawn})
    figure.text(0.03, 0.02, footer, fontsize=8, color=theme.muted)
    return figure


def _label(axes: Axes, places: dict[str, tuple[float, float]], colours: dict[str, Any]) -> None:
    """Write every name beside its point, on the first side where it covers no point and no other name."""
    points = {name: axes.transData.transform(place) for name, place in places.items()}
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points.values()]
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][0]):
        width, height = 5.6 * len(name), 11
        sides = [(8, 3), (8, -3 - height), (-8 - width, 3), (-8 - width, -3 - height), (8, 3 + height)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in sides]
        free = [i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)]
        chosen = free[0] if free else 0
        taken.append(boxes[chosen])
        dx, dy = (0.72 * d for d in sides[chosen])  # from pixels, 100 to the inch, to points
        axes.annotate(name, places[name], xytext=(dx, dy), textcoords="offset points", fontsize=8, color=colours[name])


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _spread(accuracies: Sequence[float]) -> tuple[float, float, int]:
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return statistics.fmean(accuracies), deviation, len(accuracies)


def _cell(mean: float, deviation: float, seeds: int) -> str:
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}" if seeds > 1 else f"{100 * mean:.1f}"
