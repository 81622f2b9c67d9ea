"""Checkpoints of a run: small (adapter, optimiser, position), atomic, and never executed when read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import CheckpointIO

from ..atomic import replacing
from ..errors import GraftError
from .classification import ClassificationTask


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target and renames; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint in one step; when the disk is full the old file stays."""
        # To memory first: torch.save reports a full disk as a RuntimeError without the system's reason.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint without executing anything in it."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the processor.

    Raises:
        GraftError: The file is missing, damaged, or would execute code.
    """
    if not path.is_file():
        raise GraftError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, from pickle's to RuntimeError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GraftError(f"checkpoint {path} is damaged or not one of torchgraft's: {reason[:200]}") from error


class RunCheckpoints(Checkpoint):
    """Keeps ``last.ckpt`` (start, every epoch, optionally every n steps) and ``best.ckpt``.

    A tie for best goes to the later epoch: small validation sets tie often, and with a falling learning rate
    the later weights are the calmer ones.

    Args:
        folder: Where the two files go.
        monitor: Metric that decides, ``val_accuracy`` (more is better) or ``val_loss`` (less is better).
        every_steps: Also save ``last.ckpt`` after every so many optimiser steps.
    """

    def __init__(self, folder: Path, monitor: str, every_steps: int | None = None) -> None:
        self.folder, self.monitor, self.every_steps = folder, monitor, every_steps
        self.best: float | None = None
        self.best_epoch: int | None = None
        self._saved_step = -1

    @property
    def last_path(self) -> Path:
        """The newest state."""
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """The state of the best epoch."""
        return self.folder / "best.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save once before the first step, so that a run that diverges at once has a state to look at."""
        if not trainer.ckpt_path:
            trainer.save_checkpoint(self.last_path)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in the middle of an epoch when that is asked for."""
        step = trainer.global_step
        ends = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if self.every_steps is None or step % self.every_steps or step == self._saved_step or ends:
            return
        self._saved_step = step
        if isinstance(pl_module, ClassificationTask):
            pl_module.check_finite()
        trainer.save_checkpoint(self.last_path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the epoch, and keep it as the best one if it is."""
        value = float(trainer.callback_metrics[self.monitor])
        if self.best is None or not self._worse(value, self.best):
            self.best, self.best_epoch = value, trainer.current_epoch + 1
            trainer.save_checkpoint(self.best_path)
        trainer.save_checkpoint(self.last_path)

    def state_dict(self) -> dict[str, Any]:
        """Best value and its epoch (from 1)."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved best value."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]

    def _worse(self, value: float, best: float) -> bool:
        return value < best if self.monitor == "val_accuracy" else value > best


class Patience(EarlyStopping):
    """Lightning's early stopping, which on resuming also remembers that it had already decided to stop."""

    def __init__(self, monitor: str, patience: int) -> None:
        mode = "max" if monitor == "val_accuracy" else "min"
        super().__init__(monitor=monitor, patience=patience, mode=mode, check_on_train_epoch_end=True)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once if the checkpoint says that patience had run out."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class StepLimit(L.Callback):
    """Ends training after a number of optimiser steps, at the end of which validation still runs."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop when the limit is reached."""
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True
