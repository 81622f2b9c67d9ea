"""Pad prompting (Bahng et al., "Exploring Visual Prompts for Adapting Large-Scale Models", arXiv 2203.17274).

A trained frame of width p is added to the border of the normalised image; the rest of it stays as it is:

    x' = x + frame(up, down, left, right)        up, down: (1, 3, p, S)    left, right: (1, 3, S - 2p, p)

It acts at the input of the first layer that reads the image, on every kind of backbone. The frame is tied to the
size S of the image, and an image of another size is an error. (VPT's variant enlarges the image instead.)

Parameters: 12 p (S - p) for three channels; S = 224: 25,680 for p = 10 and 69,840 for p = 30. Not mergeable: it
could fold into data preprocessing only. Start: N(0, 1) as published, so not the pretrained network.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.blocks import inner_modules
from ..core.method import Method, register
from ..core.placements import Input, Placement
from ..errors import GraftError


class PadFrame(nn.Module):
    """``image + frame``; the frame is zero but for its border.

    Shapes: (N, channels, height, width) -> the same.
    Parameters: ``2 * channels * size * (height + width - 2 * size)``.

    Args:
        size: Width of the border in pixels (p).
        channels: Channels of the image.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
    """

    def __init__(self, size: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.up = nn.Parameter(torch.randn(1, channels, size, width))
        self.down = nn.Parameter(torch.randn(1, channels, size, width))
        self.left = nn.Parameter(torch.randn(1, channels, height - 2 * size, size))
        self.right = nn.Parameter(torch.randn(1, channels, height - 2 * size, size))

    def forward(self, image: Tensor) -> Tensor:
        """Add the frame to (N, C, H, W)."""
        if image.shape[-2:] != (self.height, self.width):
            h, w = image.shape[-2:]
            raise GraftError(
                f"pad-prompt: the frame was made for images of {self.height} x {self.width} pixels and got {h} x {w}; "
                "resize the images, or attach with image_size= their size"
            )
        _, channels, rows, size = self.left.shape
        inside = self.left.new_zeros(1, channels, rows, self.width - 2 * size)
        middle = torch.cat([self.left, inside, self.right], dim=3)
        return image + torch.cat([self.up, middle, self.down], dim=2)


@register("pad-prompt")
@dataclasses.dataclass(frozen=True)
class PadPrompt(Method):
    """Config of pad prompting.

    Attributes:
        prompt_size: Width p of the frame in pixels.
        image_size: Side S of the image in pixels; null: that of the model's own input.
    """

    prompt_size: int = 30
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.prompt_size < 1:
            raise GraftError(f"pad-prompt: prompt_size={self.prompt_size} is not valid; expected at least 1 pixel")
        if self.image_size is not None and self.image_size < 1:
            raise GraftError(f"pad-prompt: image_size={self.image_size} is not valid; expected a side in pixels")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One frame, in front of the layer that reads the image."""
        shape = anatomy.trace.input if anatomy.trace else None
        reader = _reader(anatomy, shape)
        if shape is None or len(shape) != 4 or reader is None:
            raise GraftError(
                f"pad-prompt: no layer of {type(anatomy.model).__name__} was seen to read an image (N, C, H, W) in "
                f"the dry run (the model's input: {shape}); give `example=` if one does, else use another method"
            )
        _, channels, height, width = shape
        if self.image_size is not None:
            height = width = self.image_size
        if 2 * self.prompt_size >= min(height, width):
            raise GraftError(
                f"pad-prompt: prompt_size={self.prompt_size} leaves nothing of an image of {height} x {width} pixels; "
                f"use at most {(min(height, width) - 1) // 2}"
            )
        return [Input(PadFrame(self.prompt_size, channels, height, width), reader)]


def _reader(anatomy: Anatomy, shape: tuple[int, ...] | None) -> str | None:
    """The first layer that is called with the image: the stem, or a rearrangement of pixels before it."""
    if anatomy.trace is None:
        return None
    calls = anatomy.trace.calls
    leaves = [p for p in calls if p and next(inner_modules(anatomy.module(p)), None) is None]
    return next((p for p in sorted(leaves, key=lambda p: calls[p].order) if calls[p].input == shape), None)
