"""Which device a run or a prediction uses; asking for one that is not there is an error."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from ..errors import GraftError


def pick_device(device: str = "auto") -> torch.device:
    """The device that ``device`` names.

    Args:
        device: ``auto`` (CUDA, else MPS, else the processor), ``cpu``, ``cuda`` or ``mps``.

    Raises:
        GraftError: The device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, available in there.items() if available))
    if device not in there:
        raise GraftError(f"device {device!r} is not known; use auto, cpu, cuda or mps")
    if not there[device]:
        raise GraftError(f"device {device!r} was asked for, but PyTorch finds none here; use device=cpu or device=auto")
    return torch.device(device)


def is_first_process() -> bool:
    """Whether this process writes the files: data-parallel training runs the same program several times."""
    return getattr(rank_zero_only, "rank", 0) == 0


def check_devices(device: torch.device, count: int) -> None:
    """Raise a `GraftError` unless there are ``count`` devices of the kind of ``device``."""
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type != "cpu" and count > available:
        raise GraftError(f"devices={count} was asked for, but there are only {available} {device.type} devices")
