"""How a run shows where it is: a live bar on a terminal, plain lines (each epoch, each minute) elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .history import History, peak_cuda_mb, peak_rss_mb


class ProgressDisplay(L.Callback):
    """Shows epoch, loss, accuracy, throughput, time left and memory.

    Args:
        history: Where throughput and the epoch's scores come from.
        total_steps: Optimiser steps of the whole run.
        console: Where to write; standard error by default, so that output stays clean for programs.
    """

    def __init__(self, history: History, total_steps: int, console: Console | None = None) -> None:
        self.history, self.total_steps = history, total_steps
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._scores = ""
        self._started = self._line_at = time.perf_counter()
        self._first_step = 0

    quiet_seconds = 60.0
    """How long plain output is silent at most."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        self._started = self._line_at = time.perf_counter()
        self._first_step = trainer.global_step
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("training", total=self.total_steps, completed=trainer.global_step, numbers="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or write a line when there was none for a while."""
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if self._bar is not None:
            numbers = self._numbers(trainer, self._scores)
            self._bar.update(self._task, completed=trainer.global_step, description=epoch, numbers=numbers)
        elif trainer.is_global_zero and time.perf_counter() - self._line_at > self.quiet_seconds:
            self._line(epoch, self._numbers(trainer, f"step {trainer.global_step}/{self.total_steps}"))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch's scores."""
        if not trainer.is_global_zero or not self.history.rows:
            return
        row = self.history.rows[-1]
        self._scores = (
            f"loss {row['train_loss']:.3f}  val loss {row['val_loss']:.3f}"
            f"  val accuracy {100 * row['val_accuracy']:.1f} %"
        )
        if self._bar is None:
            self._line(f"epoch {row['epoch']}/{trainer.max_epochs}", self._numbers(trainer, self._scores))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error stands below it."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, *parts: str) -> None:
        self._line_at = time.perf_counter()
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)

    def _numbers(self, trainer: L.Trainer, scores: str) -> str:
        speed = f"{self.history.images_per_second:.0f} img/s"
        left = f"{_clock(self._seconds_left(trainer.global_step))} left"
        return "  ".join(filter(None, [scores, speed, left, _memory()]))

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self._first_step)
        return (time.perf_counter() - self._started) / done * max(0, self.total_steps - step)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _memory() -> str:
    cuda = peak_cuda_mb()
    return f"{peak_rss_mb() / 1000:.1f} GB" if cuda is None else f"{cuda / 1000:.1f} GB (cuda)"
