"""How long a run is: optimiser steps, epochs, and how often an epoch goes through the images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import TrainConfig


@dataclass(frozen=True)
class Budget:
    """The length of a run.

    Attributes:
        passes: Passes over the training images an epoch.
        epochs: Epochs; the last one may be cut short.
        steps: Optimiser steps in all.
    """

    passes: int
    epochs: int
    steps: int


def budget(images: int, config: TrainConfig) -> Budget:
    """The length of a run over ``images`` training images.

    A small data set is gone through several times an epoch, so that the run does not consist of a handful of
    steps with a validation after each; a large one ends inside an epoch at ``max_steps``.

    Args:
        images: Number of training images.
        config: ``epochs``, ``min_epoch_steps``, ``max_steps``, ``batch_size``, ``devices``, ``accumulate``.
    """
    batches = math.ceil(images / (config.batch_size * config.devices))
    passes = math.ceil(config.min_epoch_steps * config.accumulate / batches)
    epoch_steps = math.ceil(batches * passes / config.accumulate)
    steps = epoch_steps * config.epochs
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    return Budget(passes, math.ceil(steps / epoch_steps), steps)
