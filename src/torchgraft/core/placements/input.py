"""Input: acts on the image (or whatever the first layer reads)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from .base import Point
from .branch import Sequential


class Input(Sequential):
    """``image = form(image)`` in front of the first layer.

    It acts at the input of the stem's first layer rather than of the model, so that ``forward_features``
    and feature extractors see it too.

    Args:
        form: Module that maps the image to one of the shape the stem accepts.
        stem: Path of the first layer.
        resizes: The image has another size behind it.

    Attributes:
        splits: Whether images with and without it are of one size, so that rows of several adapters can share a batch.
    """

    kind: ClassVar[str] = "input"

    def __init__(self, form: nn.Module, stem: str, *, resizes: bool = False, slot: str | None = None) -> None:
        super().__init__(form, Point(stem, "input"), skip=False, slot=slot)
        self.splits = not resizes
