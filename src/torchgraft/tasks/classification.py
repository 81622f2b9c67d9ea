"""Image classification with an adapter as a Lightning module: loss, metrics, optimiser, what is saved.

Only the adapter is trained and only the adapter goes into a checkpoint; the frozen backbone is the same file
before and after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import Adapter
from ..errors import GraftError
from ..lean.meter import saved_bytes
from .batches import STEP, Batches, seed_everything
from .config import TrainConfig
from .metrics import Scores
from .optim import make_optimizer, make_schedule, parameter_groups


class ClassificationTask(L.LightningModule):
    """Trains the adapter of a model to classify.

    Args:
        model: The adapted model, images (N, 3, S, S) -> logits (N, K).
        adapter: The adapter in it.
        num_classes: K.
        config: Optimiser, schedule and loss.
        total_steps: Optimiser steps of the whole run.

    Attributes:
        saved_bytes: What autograd kept for the backward of the first batch, parameters and images not counted; None
            before that batch.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, num_classes: int, config: TrainConfig, total_steps: int
    ) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that the adapter's parameters are registered once, as part of the model.
        self._adapter = (adapter,)
        self.config = config
        self.total_steps = total_steps
        self.train_scores = Scores(num_classes)
        self.val_scores = Scores(num_classes)
        self.saved_bytes: int | None = None
        self._unchecked: tuple[int, Tensor] | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter that is trained."""
        return self._adapter[0]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, S, S)."""
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)

    def configure_optimizers(self) -> Any:
        """Adapter and head parameters at their own rates; nothing of the backbone."""
        optimizer = make_optimizer(parameter_groups(self.adapter, self.config), self.config)
        schedule = make_schedule(optimizer, self.config, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Set the order of the images."""
        loaders = getattr(self.trainer, "datamodule", None)
        if isinstance(loaders, Batches):
            loaders.start_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the draws of a step (dropout and the like) depend on the step alone."""
        seed_everything(STEP, self.config.seed, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch; the scores are those of the augmented images, without smoothing."""
        self.check_finite()
        images, labels = batch
        logits = self(images) if self.saved_bytes is not None else self._counted(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        self._unchecked = (self.global_step, loss.detach())
        self._score("train", self.train_scores, logits, labels)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score one batch."""
        images, labels = batch
        self._score("val", self.val_scores, self(images), labels)

    def on_train_epoch_end(self) -> None:
        """Stop before a checkpoint of broken weights is written."""
        self.check_finite()
        val_loss = float(self.trainer.callback_metrics.get("val_loss", 0.0))
        if not math.isfinite(val_loss):
            raise GraftError(self._diverged("the validation loss", val_loss, self.global_step))

    def check_finite(self) -> None:
        """Raise when the loss of the step before was not a number.

        One step late on purpose: reading a loss at once would make the processor wait for the device at every
        step. No checkpoint is written between the step and this check.

        Raises:
            GraftError: The loss was NaN or infinite.
        """
        if self._unchecked is None:
            return
        (step, loss), self._unchecked = self._unchecked, None
        if not torch.isfinite(loss):
            raise GraftError(self._diverged("the training loss", loss.item(), step))

    def _counted(self, images: Tensor) -> Tensor:
        """The logits, with a look at what is kept for the backward."""
        held: list[Tensor] = []
        own = (*self.model.parameters(), *self.model.buffers(), images)
        self.saved_bytes = saved_bytes(lambda: held.append(self(images)), own)
        return held[0]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What a checkpoint holds of the model: the adapter's tensors."""
        return self.adapter.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load the adapter's tensors."""
        self.adapter.load_state_dict(dict(state_dict))

    def _score(self, part: str, scores: Scores, logits: Tensor, labels: Tensor) -> None:
        scores.update_with(logits, labels)
        for name, metric in scores.metrics():
            self.log(f"{part}_{name}", metric, on_step=False, on_epoch=True)

    def _diverged(self, what: str, value: float, step: int) -> str:
        return (
            f"{what} became {value} at step {step + 1} (epoch {self.current_epoch + 1}); the last good"
            f" state is in checkpoints/last.ckpt; lower lr (now {self.config.lr:g}) or set precision=32"
        )
