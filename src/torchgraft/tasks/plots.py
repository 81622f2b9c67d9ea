"""Pictures of a run: curves, confusion matrix, grids of images.

Every function returns a :class:`matplotlib.figure.Figure` made without pyplot, so none needs a screen, opens
a window or leaves matplotlib's settings changed. Colours are Okabe and Ito's, which people with any common
colour vision deficiency can tell apart (https://jfly.uni-koeln.de/color/), and no meaning is carried by
colour alone: lines differ in dash and marker, cells and bars carry their number.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from ..atomic import replacing


@dataclass(frozen=True)
class Theme:
    """The colours of a picture; ``surface`` is None where the page behind it shows through."""

    surface: str | None
    ink: str
    muted: str
    line: str
    first: str
    second: str
    empty: str
    full: str
    on_full: str


LIGHT = Theme(
    surface="#ffffff", ink="#1b1f24", muted="#59636e", line="#d8dee4", first="#0072b2", second="#d55e00",
    empty="#f3f5f8", full="#004b78", on_full="#ffffff",
)  # fmt: skip
"""For pictures that stand alone, such as the one in a README."""
PAGE_LIGHT = Theme(
    surface=None, ink="#1b1f24", muted="#59636e", line="#d8dee4", first="#0072b2", second="#d55e00",
    empty="#f3f5f8", full="#004b78", on_full="#ffffff",
)  # fmt: skip
"""For a light page."""
PAGE_DARK = Theme(
    surface=None, ink="#e6edf3", muted="#9aa5b1", line="#343c46", first="#56b4e9", second="#e69f00",
    empty="#1c232c", full="#a9dcfa", on_full="#0d1117",
)  # fmt: skip
"""For a dark page."""


def curves(history: Sequence[Mapping[str, Any]], *, theme: Theme = LIGHT) -> Figure:
    """Loss and accuracy against the epoch, of the training part and of the validation part.

    Args:
        history: One mapping per epoch with any of ``train_loss``, ``val_loss``, ``train_accuracy`` and
            ``val_accuracy`` (the last two in [0, 1]); what is absent is not drawn.
        theme: Colours.
    """
    figure = blank(9.4, 3.3, theme)
    left, right = figure.subplots(1, 2)
    _lines(left, history, "loss", theme)
    _lines(right, history, "accuracy", theme)
    left.set(xlabel="epoch", ylabel="cross-entropy")
    left.set_ylim(bottom=0)
    right.set(xlabel="epoch", ylabel="share correct", ylim=(0, 1.02))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.subplots_adjust(wspace=0.25)
    dress(left, theme, "Loss")
    dress(right, theme, "Accuracy" + _best(history))
    return figure


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], *, theme: Theme = LIGHT) -> Figure:
    """Confusion matrix: a row is a true class, a column a predicted one, the colour the share of the row.

    Args:
        matrix: K x K counts.
        classes: The K names. Up to 20 classes the counts are written into the cells, up to 40 the names at
            the axes; beyond that the axes carry class numbers.
        theme: Colours.
    """
    k = len(classes)
    counts = np.asarray(matrix, dtype=np.int64).reshape(k, k)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = min(max(3.4, 0.46 * k + 1.6), 9.0)
    figure = blank(side + 1.0, side, theme)
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("share", [theme.empty, theme.first, theme.full])
    picture = axes.imshow(share, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    dress(axes, theme)
    axes.set(xlabel="predicted", ylabel="true")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if k <= 40:
        names = [shortened(c, 18) for c in classes]
        slanted = max(map(len, names), default=0) > 3
        axes.set_yticks(range(k), names)
        axes.set_xticks(range(k), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor" if slanted else "default")
    if k <= 20:
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = theme.on_full if share[i, j] > 0.45 else theme.ink
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.03, format=PercentFormatter(1.0, decimals=0))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=theme.muted, length=0, labelsize=8)
    bar.set_label("share of the true class", color=theme.muted, fontsize=8.5)
    return figure


def image_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    notes: Sequence[str],
    *,
    title: str | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Images in a landscape grid, each under a caption and a fainter note.

    Args:
        images: Pictures of any size; each keeps its proportions.
        captions: What is written above each, in bold.
        notes: The second line above each.
        title: Written above the grid.
        theme: Colours.
    """
    across = max(1, min(len(images), 6, math.ceil(math.sqrt(len(images) * 1.6))))
    down = max(1, math.ceil(len(images) / across))
    cell, words, head = 2.2, 0.55, 0.5 if title else 0.1
    width, height = (cell + 0.15) * across + 0.15, (cell + words + 0.1) * down + head
    figure = blank(width, height, theme)
    for index, image in enumerate(images):
        left = 0.15 + (index % across) * (cell + 0.15)
        top = height - head - (index // across) * (cell + words + 0.1)
        axes = figure.add_axes((left / width, (top - words - cell) / height, cell / width, cell / height))
        axes.set_axis_off()
        axes.set_anchor("NW")
        draw_image(axes, image)
        figure.text(left / width, (top - 0.24) / height, shortened(captions[index], 24),
                    fontsize=10.5, fontweight="bold", color=theme.ink)  # fmt: skip
        figure.text(left / width, (top - 0.45) / height, shortened(notes[index], 30),
                    fontsize=8.5, color=theme.muted)  # fmt: skip
    if title:
        figure.text(0.15 / width, 1 - 0.34 / height, shortened(title, 24 * across), fontsize=12,
                    color=theme.ink)  # fmt: skip
    return figure


def blank(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure of ``width`` x ``height`` inches in the colours of ``theme``."""
    with rc_context(_style()):
        figure = Figure(figsize=(width, height))
    figure.patch.set_facecolor(theme.surface or "none")
    return figure


def dress(axes: Axes, theme: Theme, title: str = "") -> None:
    """Give ``axes`` the colours of ``theme``, light spines and a title at the left."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.line)
    axes.tick_params(colors=theme.muted, labelsize=9)
    axes.xaxis.label.set_color(theme.muted)
    axes.yaxis.label.set_color(theme.muted)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left", color=theme.ink)


def draw_image(axes: Axes, image: Image.Image) -> None:
    """Show ``image`` in ``axes``; small pictures keep their hard pixels, large ones are shrunk."""
    picture = image.convert("RGB")
    picture.thumbnail((448, 448))
    axes.imshow(np.asarray(picture), interpolation="nearest" if max(picture.size) < 64 else "antialiased")


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Write ``figure`` as a PNG file in one step.

    Raises:
        GraftError: The file cannot be written.
    """
    content = _bytes(figure, format="png", dpi=dpi)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def svg(figure: Figure) -> bytes:
    """The picture as an SVG file that needs no font and carries no date, so equal runs give equal bytes."""
    return _bytes(figure, format="svg", metadata={"Date": None})


def shortened(text: str, length: int) -> str:
    """``text`` on one line, with its middle left out where it is longer than ``length``."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 3
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]


def _bytes(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with rc_context(_style()):
        figure.savefig(buffer, bbox_inches="tight", pad_inches=0.12, **options)
    return buffer.getvalue()


@functools.cache
def _style() -> Any:
    # Fonts after the first are tried glyph by glyph: class names in other scripts are drawn where the machine
    # has a font for them. Class names may contain dollar signs, which must not be read as formulas.
    wanted = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "PingFang SC", "Microsoft YaHei")
    installed = set(font_manager.get_font_names())
    return {
        "font.family": ["DejaVu Sans", *(name for name in wanted if name in installed)],
        "font.size": 10,
        "svg.fonttype": "path",
        "svg.hashsalt": "torchgraft",
        "text.parse_math": False,
    }


def _lines(axes: Axes, history: Sequence[Mapping[str, Any]], what: str, theme: Theme) -> None:
    for part, label, colour, dash, marker in (
        ("train", "training", theme.second, (0, (5, 2)), "s"),
        ("val", "validation", theme.first, "solid", "o"),
    ):
        values = [_number(row.get(f"{part}_{what}")) for row in history]
        points = [(epoch, value) for epoch, value in enumerate(values, 1) if value is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.9, label=label, clip_on=False,
                      marker=marker if len(history) <= 25 else None, markersize=4)  # fmt: skip
    axes.grid(axis="y", color=theme.line, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=theme.ink, loc="best", handlelength=2.6)


def _best(history: Sequence[Mapping[str, Any]]) -> str:
    scores = [_number(row.get("val_accuracy")) for row in history]
    best = max((score for score in scores if score is not None), default=None)
    return "" if best is None else f" (best {best:.1%}, epoch {scores.index(best) + 1})"


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None
