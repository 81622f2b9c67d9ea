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
from ..core.method import Method, register
from ..core.placements import Input, Placement
from ..errors import GraftError
from .forms.image import check_size, image_reader


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
        check_size("pad-prompt", image, self.height, self.width)
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
        reader, (_, channels, height, width) = image_reader(anatomy, self.name)
        if self.image_size is not None:
            height = width = self.image_size
        if 2 * self.prompt_size >= min(height, width):
            raise GraftError(
                f"pad-prompt: prompt_size={self.prompt_size} leaves nothing of an image of {height} x {width} pixels; "
                f"use at most {(min(height, width) - 1) // 2}"
            )
        return [Input(PadFrame(self.prompt_size, channels, height, width), reader)]
