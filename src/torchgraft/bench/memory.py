"""Memory of training: what every method keeps for the backward and all that is in memory beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.method import methods as registered
from ..errors import GraftError
from ..lean import meter
from .goals import Goal
from .subjects import PEERS, Setting, Subject, backbone, default_methods, subject

MOMENTS = 2
"""Tensors that AdamW keeps per trained tensor."""

ACCEPTED = 224
"""Side of the images that the limits below were set for; smaller ones leave relatively more to fixed costs."""

OF_FULL: dict[str, dict[tuple[str, str], float]] = {
    "resnet50": {("conv-adapter", "exact"): 0.125, ("ssf", "exact"): 0.60},
    "efficientnet_lite0": {("conv-adapter", "exact"): 0.25},
    "convnext_tiny": {
        ("conv-adapter", "exact"): 0.55,
        ("conv-adapter", "compact"): 0.30,
        ("conv-adapter", "recompute"): 0.23,
        ("conv-adapter", "checkpoint"): 0.12,
        ("ssf", "exact"): 0.60,
    },
    "vit_small_patch16_224": {("vpt-deep", "recompute"): 0.40, ("vpt-deep", "checkpoint"): 0.08},
}
"""Backbone -> (method, level) -> the largest accepted part of what full fine-tuning saves for the backward."""
OF_PEFT = {"resnet50": 0.14, "efficientnet_lite0": 0.20, "convnext_tiny": 0.50, "vit_small_patch16_224": 0.65}
"""Backbone -> the largest accepted part of what LoRA of HF peft saves on the layers of ours, at level exact."""
WHOLE_OF_FULL = {"resnet50": 0.18}
"""Backbone -> the largest accepted part of full fine-tuning's whole training memory, Conv-Adapter at level exact."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one variant.

    Attributes:
        method: Method or peer, in its string form.
        level: Name of the level; empty for peers.
        trainable: Number of values that are trained.
        saved: What autograd keeps for the backward of one batch.
        peak: The most that forward and backward held at once, by the allocator; None when it was not measured.
        weights: Parameters and buffers.
        gradients: Gradients of what is trained.
        optimiser: AdamW's moments.
    """

    method: str
    level: str
    trainable: int
    saved: int
    peak: int | None
    weights: int
    gradients: int
    optimiser: int

    @property
    def whole(self) -> int:
        """Weights, gradients, optimiser and what is saved: the memory of training."""
        return self.weights + self.gradients + self.optimiser + self.saved


ALL = "all"
"""In place of a list of methods: every one that applies."""
_NO_ADAPTERS = ("full", "partial")
"""What trains the backbone itself: the peer ``full`` is measured anyway."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All variants of one backbone.

    Attributes:
        setting: Backbone and input.
        rows: Full fine-tuning first.
        refused: Method -> why it does not apply to the backbone.
    """

    setting: Setting
    rows: Sequence[Memory]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def row(self, method: str, level: str = "") -> Memory | None:
        """The row of a method (by its name, whatever its options) at a level; None when it was not measured."""
        return next((r for r in self.rows if name_of(r.method) == method and r.level == level), None)

    def to(self, peer: str, row: Memory) -> float | None:
        """What ``row`` saves relative to a peer; None when the peer was not measured."""
        other = self.row(peer)
        return row.saved / other.saved if other else None

    def goals(self) -> list[Goal]:
        """What the rows are held against: no method above full fine-tuning, and the limits of known backbones."""
        found = [
            Goal(f"saved / full, {name_of(r.method)} exact", r.saved / self.rows[0].saved, 1.0)
            for r in self.rows
            if r.level == "exact" and (name_of(r.method), "exact") not in self._limits(OF_FULL, {})
        ]
        for (method, level), limit in self._limits(OF_FULL, {}).items():
            row = self.row(method, level)
            if row:
                found.append(Goal(f"saved / full, {method} {level}", row.saved / self.rows[0].saved, limit))
        lora, peft = self.row("lora", "exact"), self.row("peft-lora")
        limit = self._limits(OF_PEFT, None)
        if lora and peft and limit:
            found.append(Goal("saved / HF peft, lora exact", lora.saved / peft.saved, limit))
        adapter, limit = self.row("conv-adapter", "exact"), self._limits(WHOLE_OF_FULL, None)
        if adapter and limit:
            found.append(Goal("whole / full, conv-adapter exact", adapter.whole / self.rows[0].whole, limit))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        rows = [
            {
                **dataclasses.asdict(r),
                "whole": r.whole,
                "of_full": self.to("full", r),
                "of_peft": self.to("peft-lora", r),
            }
            for r in self.rows
        ]
        return {**self.setting.to_dict(), "rows": rows, "refused": self.refused}

    def _limits(self, table: dict[str, Any], otherwise: Any) -> Any:
        return table.get(self.setting.model, otherwise) if self.setting.image_size >= ACCEPTED else otherwise


def compare(
    setting: Setting,
    methods: Iterable[str] | None = None,
    levels: Iterable[str] = ("plain", "exact"),
    *,
    fake: bool = False,
    say: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Measure the bytes of every method at every level, and of the peers.

    Args:
        setting: Backbone and input.
        methods: Methods and peers; None: the peers and what suits the backbone; ``all``: every registered method
            that applies. Full fine-tuning is always measured.
        levels: Names of levels.
        fake: Count what is saved on tensors without data, in less time; the peak is not measured then.
        say: Called with the name of each variant before it is measured.

    Raises:
        GraftError: Whatever attaching raises, or peft is not installed.
    """
    named = None if methods is None else list(methods)
    suited = default_methods(backbone(setting))
    chosen = ["full", *(named or ())] if named else [*PEERS, *suited]
    every = named == [ALL]
    if every:
        options = {name_of(m): m for m in suited}
        chosen = ["full", *(options.get(m, m) for m in registered() if m not in _NO_ADAPTERS)]
    rows, refused = [], {}
    for method in dict.fromkeys(chosen):
        for level in [""] if method in PEERS else levels:
            say(f"{method} {level}".strip())
            try:
                rows.append(measure(subject(setting, method, level or "plain"), fake=fake))
            except GraftError as error:
                if not every:
                    raise
                refused[method] = str(error)
    return Comparison(setting, rows, refused)


def measure(one: Subject, *, fake: bool = False) -> Memory:
    """The bytes of one variant."""
    peak = None
    if fake:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        ghost = one.ghost(mode)
        with mode:
            saved = meter.saved_bytes(ghost.loss, ghost.held())
    else:
        saved = meter.saved_bytes(one.loss, one.held())
        peak = meter.peak_bytes(one.gradients, one.image.device)
    trained = list(one.trained().values())
    gradients = _bytes(trained)
    return Memory(
        method=one.method,
        level=one.level,
        trainable=sum(p.numel() for p in trained),
        saved=saved,
        peak=peak,
        weights=_bytes([*one.model.parameters(), *one.model.buffers()]),
        gradients=gradients,
        optimiser=MOMENTS * gradients,
    )


def name_of(method: str) -> str:
    """The name of a method without its options."""
    return method.partition("[")[0]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)
