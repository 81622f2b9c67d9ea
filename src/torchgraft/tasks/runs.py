"""The folder of a run: what lies in it, who may create it, and what it says about where it was made.

====================  ===========================================================
``config.yaml``       every setting, resolved
``environment.json``  versions, platform, seed and a hash of the image lists
``metrics.csv``       one line an epoch
``events...``         the same for TensorBoard
``checkpoints/``      last.ckpt, best.ckpt: adapter, optimiser and position only
``train_ids.json``    the images that few-shot training drew
``prefix-cache/``     activations of the images, with ``cache_prefix``; stays when a run is overwritten
``adapter/``          the result, for `torchgraft.load`
``summary.json``      the `RunResult`
====================  ===========================================================
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..errors import GraftError
from .config import TrainConfig, read_config
from .devices import is_first_process

# What a run may have written; an overwrite removes these and nothing else.
_FILES = ("config.yaml", "environment.json", "metrics.csv", "train_ids.json", "summary.json", "report.html")
_PATTERNS = ("events.out.tfevents.*", ".*.part")
_FOLDERS = ("checkpoints", "adapter", "report")

# Settings that say where and how fast to compute, not what; they may change when a run is resumed.
_FREE = frozenset({"out", "workers", "device", "checkpoint_every", "cache_dir"})
# Settings that can be left open; a run that is resumed goes on with what it was started with.
_OPEN = ("channels_last", "precision")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """Every setting, resolved."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, platform, seed and a hash of the image lists."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One line an epoch."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``last.ckpt`` and ``best.ckpt``."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The finished adapter's folder."""
        return self.path / "adapter"

    @property
    def prefix_cache(self) -> Path:
        """Activations of the images below the first trained site."""
        return self.path / "prefix-cache"

    @property
    def train_ids(self) -> Path:
        """The images that few-shot training drew."""
        return self.path / "train_ids.json"

    @property
    def summary(self) -> Path:
        """The `RunResult` as JSON."""
        return self.path / "summary.json"

    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    def check(self, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
        """Make sure that a run may use the folder; nothing is written.

        Args:
            config: The settings of the run.
            resume: Go on with the run that is there, if there is one.
            overwrite: Replace the run that is there.

        Raises:
            GraftError: The folder is in use, belongs to something else or (with ``resume``) holds a run with
                other settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise GraftError(f"out: {self.path} is a file; name a folder for the run")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self.is_run():
            raise GraftError(f"out: {self.path} is not empty and holds no torchgraft run; choose another folder")
        if resume:
            self._check_same(config)
        elif not overwrite:
            raise GraftError(f"out: {self.path} holds a run already; choose another folder, resume or overwrite")

    def settled(self, config: TrainConfig) -> TrainConfig:
        """The settings, with those that are left open as the run that is here was started with.

        Raises:
            GraftError: The run's own settings cannot be read.
        """
        if not self.is_run():
            return config
        before = read_config(self.config)
        return config.model_copy(update={n: getattr(before, n) for n in _OPEN if getattr(config, n) is None})

    def create(self, config: TrainConfig, *, resume: bool) -> None:
        """Write ``config.yaml``; without ``resume`` first remove what an earlier run left.

        Raises:
            GraftError: The folder cannot be written.
        """
        if self.is_run() and resume:
            return
        if self.is_run():
            self._clear()
        write_text(self.config, config.to_yaml())

    def _clear(self) -> None:
        try:
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
            for pattern in _PATTERNS:
                for path in self.path.glob(pattern):
                    path.unlink()
            for name in _FOLDERS:
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
        except OSError as error:
            raise GraftError(f"out: cannot overwrite {self.path}: {error.strerror or error}") from error

    def _check_same(self, config: TrainConfig) -> None:
        before, now = (c.model_dump(mode="json") for c in (read_config(self.config), config))
        for name, value in before.items():
            if name not in _FREE and now[name] != value and not (name in _OPEN and now[name] is None):
                raise GraftError(
                    f"resume: {name} was {value!r} in {self.path} and is {now[name]!r} now;"
                    " give the same settings or start another run"
                )


def run_folder(config: TrainConfig, *, resume: bool = False) -> RunFolder:
    """The folder of a run: ``config.out``, or the next free ``runs/DATA-BACKBONE-METHOD``.

    Raises:
        GraftError: ``resume`` without ``out``.
    """
    if config.out is not None:
        return RunFolder(config.out.expanduser())
    if resume:
        raise GraftError("resume: name the run folder with out=FOLDER")
    data = Path(config.data).stem if "/" in config.data else config.data
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{data}-{config.backbone}-{config.method_name}").strip("-")
    number = 1
    while (path := Path("runs") / _numbered(name, number)).exists():
        number += 1
    if is_first_process():
        return RunFolder(path)
    # The first process made its folder before it started the others of a data-parallel run.
    return RunFolder(Path("runs") / _numbered(name, max(1, number - 1)))


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def describe_environment(seed: int, parts: dict[str, list[str]]) -> dict[str, Any]:
    """Where a run was made: versions, platform, revision, seed, and a hash of each part's image names.

    Args:
        seed: The run's seed.
        parts: Part name -> names of its images in order.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "revision": _revision(),
        "data": {
            part: {"images": len(ids), "sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest()}
            for part, ids in parts.items()
        },
    }


def check_same_data(recorded: Path, environment: dict[str, Any]) -> None:
    """Raise a `GraftError` if the images are not those that the run was started with.

    Args:
        recorded: The run's ``environment.json``.
        environment: What `describe_environment` says now.
    """
    try:
        before = json.loads(recorded.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraftError(f"resume: {recorded} is damaged; start another run") from error
    for part, now in environment["data"].items():
        if before.get(part) != now:
            raise GraftError(
                f"resume: the {part} images are not those that the run was started with ({now['images']} images"
                f" now); restore them or start another run"
            )


_PACKAGES = ("torchgraft", "torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow")


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The git revision of a source checkout of torchgraft; None for an installed package."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if not (root / ".git").exists() or package != root / "src" / "torchgraft":
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
