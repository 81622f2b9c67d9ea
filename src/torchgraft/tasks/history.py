"""One record per epoch: learning rates, scores, throughput and memory, in ``metrics.csv``."""

from __future__ import annotations

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ..atomic import write_text

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "head_lr",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "val_top5",
    "images_per_second",
    "seconds",
    "peak_rss_mb",
    "peak_cuda_mb",
)


class History(L.Callback):
    """Collects the records, writes them after every epoch and keeps them in the checkpoint.

    Args:
        path: The ``metrics.csv`` to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._before = 0.0
        self._started = self._epoch_started = self._last_step = time.perf_counter()
        self._images = 0
        self._rates: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Wall-clock time spent in training so far, earlier parts of a resumed run included."""
        return self._before + time.perf_counter() - self._started

    @property
    def images_per_second(self) -> float:
        """Training images a second in this epoch so far, validation not counted, over all devices."""
        return self._images / max(1e-9, self._last_step - self._epoch_started)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = self._epoch_started = self._last_step = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting images."""
        self._epoch_started = self._last_step = time.perf_counter()
        self._images = 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the rates of the step; the schedule moves them on right after it."""
        self._rates = {group["name"].removesuffix("-1d"): group["lr"] for group in optimizer.param_groups}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images."""
        self._images += len(batch[1]) * trainer.world_size
        self._last_step = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep and write the epoch's record; runs after the module has logged and before the checkpoint."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": self._rates.get("adapter", self._rates.get("head")),
            "head_lr": self._rates.get("head"),
            **{name: metrics[name] for name in COLUMNS if name in metrics},
            "images_per_second": self.images_per_second,
            "seconds": self.seconds,
            "peak_rss_mb": peak_rss_mb(),
            "peak_cuda_mb": peak_cuda_mb(),
        }
        self.rows.append({name: row.get(name) for name in COLUMNS})
        extra = {name: row[name] for name in ("lr", "head_lr", "images_per_second", "peak_rss_mb", "peak_cuda_mb")}
        for logger in trainer.loggers:
            logger.log_metrics({n: v for n, v in extra.items() if v is not None}, step=trainer.global_step)
        if trainer.is_global_zero:
            self.write()

    def write(self) -> None:
        """Replace ``metrics.csv``."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in self.rows)
        write_text(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """The records and the time spent."""
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved records."""
        self.rows, self._before = list(state_dict["rows"]), float(state_dict["seconds"])


def peak_rss_mb() -> float:
    """Largest resident memory of this process since it started, MB (10^6 bytes); 0 where unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def peak_cuda_mb() -> float | None:
    """Largest memory that PyTorch held on the current CUDA device, MB; None without CUDA in use."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated() / 1e6
