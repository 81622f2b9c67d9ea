"""Size of an adapter's file by storage type, and what storing changes of the outputs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..core.adapter import detach
from ..core.checkpoint import DTYPES, WEIGHTS, load
from .equal import relative
from .goals import Goal
from .memory import name_of
from .subjects import Setting, subject

CHANGE = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2}
"""Storage type -> the largest relative change of outputs that it may make."""
OF_FULL_FILE = {("resnet50", "conv-adapter"): {"fp32": 1 / 60, "fp16": 1 / 120}}
"""(backbone, method) -> storage type -> the largest part of the full model's file."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One storage type.

    Attributes:
        dtype: Its name.
        file: Bytes of the adapter's tensors on disk, head included.
        of_full: That file relative to the file of the full model in fp32.
        change: The largest change of an output, relative to the largest output.
        same: Part of the batch whose predicted class stays the same.
    """

    dtype: str
    file: int
    of_full: float
    change: float
    same: float


@dataclasses.dataclass(frozen=True)
class Delta:
    """All storage types of one method.

    Attributes:
        setting: Backbone and input.
        method: The method in its string form.
        full: Bytes of the full model's file in fp32.
        rows: One per storage type.
    """

    setting: Setting
    method: str
    full: int
    rows: Sequence[Stored]

    def goals(self) -> list[Goal]:
        """Small changes of outputs and, for known backbones, small files."""
        limits = OF_FULL_FILE.get((self.setting.model, name_of(self.method)), {})
        found = [Goal(f"output change, {r.dtype}", r.change, CHANGE[r.dtype]) for r in self.rows]
        return found + [
            Goal(f"file / full, {r.dtype}", r.of_full, limits[r.dtype]) for r in self.rows if r.dtype in limits
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        rows = [dataclasses.asdict(r) for r in self.rows]
        return {**self.setting.to_dict(), "method": self.method, "full": self.full, "rows": rows}


def stored(setting: Setting, method: str, *, say: Callable[[str], None] = lambda name: None) -> Delta:
    """Save an adapter in every storage type, load it again, and compare the outputs.

    Args:
        setting: Backbone and input.
        method: A method with options.
        say: Called with the name of each type.

    Raises:
        GraftError: Whatever attaching, saving or loading raises.
    """
    one = subject(setting, method)
    assert one.adapter is not None
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        full = _full_file(one.model, Path(folder) / "full.safetensors")
        reference = one.model(one.image)
        for dtype in DTYPES:
            say(dtype)
            where = Path(folder) / dtype
            one.adapter.save(where, dtype=dtype)
            load(one.model, where, name=dtype)
            out = one.model(one.image)
            detach(one.model, dtype)
            same = (out.argmax(1) == reference.argmax(1)).float().mean().item()
            file = (where / WEIGHTS).stat().st_size
            rows.append(Stored(dtype, file, file / full, relative(out, reference), same))
    return Delta(setting, method, full, rows)


def _full_file(model: torch.nn.Module, path: Path) -> int:
    """Bytes of the file of all parameters and buffers of the backbone, without adapters, in fp32."""
    state = {name: t for name, t in model.state_dict().items() if "torchgraft" not in name.split(".")}
    save_file({n: t.float().contiguous() if t.is_floating_point() else t for n, t in state.items()}, path)
    return path.stat().st_size
