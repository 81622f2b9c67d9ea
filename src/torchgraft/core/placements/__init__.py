"""The only things a method can ask for. Each says how it acts, what it owns and what can be folded."""

from .affine import Affine, affine_for
from .base import Hook, Placement, Point, Support
from .branch import MAP, Layout, Parallel, Sequential, Stream
from .input import Input
from .key_value import KeyValue
from .replace import Replace
from .tokens import Tokens
from .train import BatchStats, Train
from .weight import WeightDelta
from .window_tokens import WindowPath, WindowTokens

PLACEMENTS: dict[str, type[Placement]] = {
    c.kind: c
    for c in (
        Parallel,
        Sequential,
        Stream,
        Affine,
        WeightDelta,
        Tokens,
        WindowTokens,
        KeyValue,
        Input,
        Train,
        Replace,
        BatchStats,
    )
}
"""Every placement by its kind, for the table in the documentation."""

__all__ = [
    "MAP",
    "PLACEMENTS",
    "Affine",
    "BatchStats",
    "Hook",
    "Input",
    "KeyValue",
    "Layout",
    "Parallel",
    "Placement",
    "Point",
    "Replace",
    "Sequential",
    "Stream",
    "Support",
    "Tokens",
    "Train",
    "WeightDelta",
    "WindowPath",
    "WindowTokens",
    "affine_for",
]
