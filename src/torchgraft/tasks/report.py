"""``report.html``: a run on one page that needs nothing else, to look at, to mail, to keep.

Pictures and plots are inside the file as data URIs, there is no script, and the page forbids itself to load
anything (Content-Security-Policy). Everything that comes from data, such as class names and file names, is
escaped.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure
from PIL import Image

from ..atomic import write_text
from ..data import ImageDataset, load_data
from ..errors import GraftError
from .config import read_config
from .plots import PAGE_DARK, PAGE_LIGHT, Theme, confusion, curves, svg
from .quantities import duration, interval, percent, size
from .results import RunResult

MISTAKES = 24
"""Pictures of wrong answers on the page."""

CLASSES = 100
"""Rows in the table of classes; of more classes the hardest are shown."""


def write_report(result: RunResult, out: Path, *, held_out: ImageDataset | None = None) -> Path:
    """Write ``report.html`` of a run.

    Args:
        result: What the run ended with.
        out: The run folder; its ``config.yaml`` and ``environment.json`` go onto the page where they exist.
        held_out: The part of the data that ``result`` was measured on, for the pictures of the mistakes; when
            left out it is loaded again as the configuration says, and if that fails there are no pictures.

    Returns:
        The path of the page.

    Raises:
        GraftError: The page cannot be written.
    """
    settings = _mapping(out / "config.yaml", yaml.safe_load)
    environment = _mapping(out / "environment.json", json.loads)
    worst = result.worst[:MISTAKES]
    pictures = _pictures([mistake.id for mistake in worst], held_out or _held_out(out))
    answers = result.test_images
    low, high = interval(result.accuracy, answers)
    part = f"the {answers:,} {_PARTS.get(result.part, result.part)} images"
    side = 62 * len(result.classes) + 320
    page = _template().render(
        title=f"{result.method} on {result.backbone}",
        subtitle=(
            f"{result.data} · {len(result.classes)} classes · {result.train_images:,} training images"
            f" · {result.epochs} epochs"
        ),
        tiles=_tiles(result, low, high),
        remark=_remark(result),
        part=part,
        curves=_both(lambda theme: curves(result.history, theme=theme)) if result.history else None,
        matrix=_both(lambda theme: confusion(result.confusion, result.classes, theme=theme)),
        matrix_width=min(side, 960),
        per_class=_per_class(result),
        worst=[
            {
                "id": mistake.id,
                "true": mistake.true,
                "predicted": mistake.predicted,
                "confidence": percent(mistake.confidence),
                "picture": pictures.get(mistake.id),
            }
            for mistake in worst
        ],
        parameters=_parameters(result),
        costs=_costs(result),
        commands=[
            f"torchgraft predict {out / 'adapter'} IMAGE...",
            f"torchgraft eval {out} DATA",
            f"torchgraft inspect {out / 'adapter'}",
        ],
        settings=_flat(settings),
        environment=_flat(environment),
    )
    target = out / "report.html"
    write_text(target, page)
    return target


_PARTS = {"test": "test", "val": "validation", "train": "training"}


def _template() -> jinja2.Template:
    source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _tiles(result: RunResult, low: float, high: float) -> list[dict[str, str]]:
    whole = 4 * (result.backbone_params + result.head_params)
    top5 = f", top-5 {percent(result.top5)}" if result.top5 is not None else ""
    return [
        {
            "value": percent(result.accuracy),
            "label": f"{_PARTS.get(result.part, result.part)} accuracy",
            "note": f"95% interval {percent(low)} to {percent(high)}{top5}",
        },
        {
            "value": percent(result.adapter_params / max(1, result.backbone_params)),
            "label": "of the backbone's parameters",
            "note": f"{result.adapter_params:,} in the adapter",
        },
        {
            "value": size(result.adapter_bytes),
            "label": "on disk",
            "note": f"a copy of the model: {size(whole)}",
        },
        {
            "value": duration(result.seconds),
            "label": "training time",
            "note": f"{result.images_per_second:,.0f} images a second",
        },
    ]


def _remark(result: RunResult) -> str:
    remarks = []
    if result.part != "test":
        remarks.append(
            "The data has no test part: the accuracy was measured on the images that also picked the best"
            " epoch, so expect slightly less on new images."
        )
    if result.skipped:
        remarks.append(f"{result.skipped} images could not be read and were left out.")
    if result.stopped_early:
        remarks.append("Training ended early because the validation score no longer rose.")
    return " ".join(remarks)


def _per_class(result: RunResult) -> list[dict[str, Any]]:
    rows = []
    for index, (name, counts) in enumerate(zip(result.classes, result.confusion, strict=True)):
        total, correct = sum(counts), counts[index]
        others = sorted(((n, j) for j, n in enumerate(counts) if j != index and n), reverse=True)[:2]
        rows.append(
            {
                "name": name,
                "count": total,
                "correct": correct,
                "accuracy": percent(correct / total) if total else "none",
                "width": round(100 * correct / total, 1) if total else 0,
                "confused": ", ".join(f"{result.classes[j]} ({n})" for n, j in others),
            }
        )
    if len(rows) > 12:
        rows.sort(key=lambda row: (row["count"] == 0, row["width"]))
    return rows[:CLASSES]


def _parameters(result: RunResult) -> list[dict[str, str]]:
    backbone = max(1, result.backbone_params)
    return [
        {"name": name, "count": f"{count:,}", "share": percent(count / backbone)}
        for name, count in (
            ("adapter, trained", result.adapter_params),
            ("head, trained", result.head_params),
            ("trained together", result.trainable_params),
            ("backbone, frozen", result.backbone_params),
        )
    ]


def _costs(result: RunResult) -> list[dict[str, str]]:
    rows = [
        ("adapter folder on disk", size(result.adapter_bytes)),
        ("training time", duration(result.seconds)),
        ("optimiser steps", f"{result.steps:,}"),
        ("images a second", f"{result.images_per_second:,.1f}"),
        ("peak memory of the process", size(result.peak_rss_mb * 1e6)),
    ]
    if result.saved_bytes is not None:
        rows.append(("kept for the backward of a batch", f"{size(result.saved_bytes)} ({_how_kept(result)})"))
    if result.peak_cuda_mb is not None:
        rows.append(("peak memory on the GPU", size(result.peak_cuda_mb * 1e6)))
    rows.append(("epoch that was kept", f"{result.best_epoch} of {result.epochs}"))
    return [{"name": name, "value": value} for name, value in rows]


def _how_kept(result: RunResult) -> str:
    rounded = "" if result.frozen_dtype == "fp32" else f", frozen part in {result.frozen_dtype}"
    return f"lean: {result.lean}{rounded}"


def _both(draw: Callable[[Theme], Figure]) -> dict[str, str]:
    return {
        name: _data_uri("image/svg+xml", svg(draw(theme)))
        for name, theme in (("light", PAGE_LIGHT), ("dark", PAGE_DARK))
    }


def _pictures(ids: Sequence[str], part: ImageDataset | None) -> dict[str, str]:
    if part is None:
        return {}
    places = {name: index for index, name in enumerate(part.ids)}
    found = {}
    for name in ids:
        if name in places:
            try:
                found[name] = _thumbnail(part.image(places[name]))
            except (OSError, GraftError):
                continue  # the file has gone since; the mistake is listed without its picture
    return found


def _thumbnail(image: Image.Image) -> str:
    picture = image.convert("RGB")
    picture.thumbnail((224, 224))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    return _data_uri("image/jpeg", buffer.getvalue())


def _held_out(out: Path) -> ImageDataset | None:
    try:
        config = read_config(out / "config.yaml")
        data = load_data(config.data, seed=config.seed, shots=config.shots, val_fraction=config.val_fraction)
    except GraftError:
        return None
    return data.val if data.test is None else data.test


def _mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value))))
        else:
            rows.append((f"{prefix}{key}", "" if value is None else str(value)))
    return rows


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
