"""Arithmetic: which types a run computes in, and which combinations of settings make sense."""

from __future__ import annotations

from typing import Literal

import torch

from ..errors import GraftError
from .config import TrainConfig


def trainer_precision(config: TrainConfig, device: torch.device) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """What Lightning's Trainer is told.

    A backbone in bfloat16 computes in bfloat16 by itself, so the Trainer adds no autocast; one in float16 needs the
    loss scaler that comes with Lightning's ``16-mixed``.

    Raises:
        GraftError: ``precision`` contradicts ``frozen_dtype``, or the device cannot do it.
    """
    frozen, precision = config.frozen_dtype, config.precision
    fitting = {"fp32": ("32", "bf16-mixed", "16-mixed"), "bf16": ("bf16-mixed",), "fp16": ("16-mixed",)}[frozen]
    if precision is not None and precision not in fitting:
        raise GraftError(
            f"frozen_dtype={frozen} with precision={precision}: the frozen part computes in {frozen}; "
            f"leave precision out (it is {fitting[0]} then) or set frozen_dtype=fp32"
        )
    if device.type == "cpu" and (precision == "16-mixed" or frozen == "fp16"):
        what = "frozen_dtype fp16" if frozen == "fp16" else "precision '16-mixed'"
        other = "frozen_dtype=bf16" if frozen == "fp16" else "precision=bf16-mixed or precision=32"
        raise GraftError(f"{what} needs a GPU; use {other} on the cpu")
    if frozen == "fp16":
        return "16-mixed"
    if frozen == "bf16" or precision is None or precision == "32":
        return "32-true"
    return precision
