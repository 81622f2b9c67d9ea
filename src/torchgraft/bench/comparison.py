"""The picture that explains a comparison: what is asked on the left, how each method does on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from ..tasks.plots import LIGHT, Theme, blank, draw_image, dress


@dataclass(frozen=True)
class Bar:
    """One method in a comparison.

    Attributes:
        label: Name of the method.
        accuracy: Share of correct answers, in [0, 1].
        note: What it cost, in a few words.
        highlight: Whether this is the bar that the picture is about.
    """

    label: str
    accuracy: float
    note: str
    highlight: bool = False


def comparison(
    bars: Sequence[Bar],
    samples: Sequence[tuple[Image.Image, str]],
    *,
    title: str,
    question: str,
    chance: float,
    footer: str,
    theme: Theme = LIGHT,
) -> Figure:
    """Images with their answers beside one bar of accuracy for every method.

    Args:
        bars: The methods, drawn from top to bottom.
        samples: Images with their answers; the first six are drawn.
        title: The finding in one sentence.
        question: What the images ask.
        chance: Accuracy of guessing, drawn as a dashed line.
        footer: Small print: data, backbone, seed.
        theme: Colours.
    """
    figure = blank(12.0, 5.0, theme)
    figure.text(0.03, 0.915, title, fontsize=17, fontweight="bold", color=theme.ink)
    figure.text(0.03, 0.825, question, fontsize=12, color=theme.ink)
    figure.text(0.03, 0.040, footer, fontsize=9, color=theme.muted)
    halves = figure.add_gridspec(
        1, 2, width_ratios=(1.0, 1.45), left=0.03, right=0.97, top=0.79, bottom=0.17, wspace=0.12
    )
    cells = halves[0].subgridspec(2, 3, wspace=0.06, hspace=0.22)
    for index, (image, answer) in enumerate(samples[:6]):
        axes = figure.add_subplot(cells[index // 3, index % 3])
        axes.set_axis_off()
        draw_image(axes, image)
        axes.text(0.5, -0.03, answer, transform=axes.transAxes, ha="center", va="top",
                  fontsize=11, fontweight="bold", color=theme.ink)  # fmt: skip
    _draw_bars(figure.add_subplot(halves[1]), bars, chance, theme)
    return figure


def _draw_bars(axes: Axes, bars: Sequence[Bar], chance: float, theme: Theme) -> None:
    for row, bar in zip(np.arange(len(bars))[::-1], bars, strict=True):
        colour = theme.first if bar.highlight else theme.muted
        axes.barh(row, bar.accuracy, height=0.44, color=colour, alpha=1.0 if bar.highlight else 0.6)
        inside = bar.accuracy > 0.85
        axes.text(bar.accuracy + (-0.012 if inside else 0.012), row, f"{bar.accuracy:.1%}", va="center",
                  ha="right" if inside else "left", fontsize=15, fontweight="bold",
                  color=(theme.on_full if bar.highlight else theme.ink) if inside else colour)  # fmt: skip
        axes.text(0, row + 0.27, bar.label, va="bottom", fontsize=12.5, fontweight="bold", color=theme.ink)
        axes.text(1, row + 0.275, bar.note, va="bottom", ha="right", fontsize=9.5, color=theme.muted)
        axes.plot([chance, chance], [row - 0.22, row + 0.22], color=theme.ink, linewidth=1.2, linestyle=(0, (3, 3)))
    axes.text(chance, -0.32, f"guessing: {chance:.0%}", fontsize=9, color=theme.muted, ha="center", va="top")
    axes.set(xlim=(0, 1), ylim=(-0.68, len(bars) - 1 + 0.62), xlabel="accuracy on images not seen in training")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_yticks([])
    axes.grid(axis="x", color=theme.line, linewidth=0.7)
    dress(axes, theme)
    axes.spines["left"].set_visible(False)
