"""Optimiser and learning rate of an adapter: two rates, one for the adapter and one for its head.

The head starts from nothing while the adapter starts from a trained network. Given the adapter's rate, a new
head memorises a small data set before the adapter has moved; measured on 320 images that costs 4-5 points of
accuracy. Hence two groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig

if TYPE_CHECKING:
    from ..core import Adapter


def parameter_groups(adapter: Adapter, config: TrainConfig) -> list[dict[str, Any]]:
    """Optimiser groups ``adapter`` and ``head``, each split in decayed and (1-D) undecayed parameters.

    Args:
        adapter: What is trained; nothing else of the model is.
        config: ``lr``, ``head_lr`` and ``weight_decay``.
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, parameter in adapter.named_parameters():
        part = "head" if path.startswith("head.") else "adapter"
        decayed = parameter.ndim > 1
        name = part if decayed else f"{part}-1d"
        lr = config.head_lr if part == "head" and config.head_lr is not None else config.lr
        group = groups.setdefault(
            name,
            {"name": name, "params": [], "lr": lr, "weight_decay": config.weight_decay if decayed else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9, on the groups of `parameter_groups`."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups)


def make_schedule(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up, then cosine down to ``min_lr`` (or constant), step by step.

    Step n of N uses ``peak * (n + 1) / W`` during the W warm-up steps and
    ``min_lr + (peak - min_lr) * (1 + cos(pi * (n - W) / (N - W))) / 2`` after them.

    Args:
        optimizer: Its groups hold the peak rates.
        config: ``schedule``, ``warmup`` and ``min_lr``.
        total_steps: N, the number of optimiser steps.
    """
    warmup_steps = round(config.warmup * total_steps)

    def factor_of(peak: float) -> Any:
        floor = min(config.min_lr / peak, 1.0)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            if config.schedule == "constant":
                return 1.0
            done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return floor + (1 - floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

        return factor

    return LambdaLR(optimizer, [factor_of(group["lr"]) for group in optimizer.param_groups])
