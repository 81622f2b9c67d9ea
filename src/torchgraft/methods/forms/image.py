"""Prompts on the image: the layer that reads it, and what is put around it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.blocks import class_name, inner_modules
from ...errors import GraftError
from .prompts import ImageNetNorm


def image_reader(anatomy: Anatomy, name: str) -> tuple[str, tuple[int, ...]]:
    """The first layer that is called with the image (the stem, or a rearrangement of pixels before it), and its shape.

    Raises:
        GraftError: The dry run saw no such layer.
    """
    shape = anatomy.trace.input if anatomy.trace else None
    reader = next(_called_with(anatomy, shape, leaves=True), None)
    if shape is None or len(shape) != 4 or reader is None:
        raise GraftError(
            f"{name}: no layer of {class_name(anatomy.model)} was seen to read an image (N, C, H, W) in the dry run "
            f"(the model's input: {shape}); give `example=` if one does, else use another method"
        )
    return reader, shape


def image_readers(anatomy: Anatomy, name: str) -> list[str]:
    """:func:`image_reader`, and the modules around it that are called with the image too, from the inside out.

    Raises:
        GraftError: As for :func:`image_reader`.
    """
    reader, shape = image_reader(anatomy, name)
    around = [p for p in _called_with(anatomy, shape, leaves=False) if reader.startswith(f"{p}.")]
    return [reader, *around]


def _called_with(anatomy: Anatomy, shape: tuple[int, ...] | None, *, leaves: bool) -> Iterator[str]:
    calls = anatomy.trace.calls if anatomy.trace else {}
    for path in sorted((p for p in calls if p), key=lambda p: calls[p].order):
        leaf = next(inner_modules(anatomy.module(path)), None) is None
        if leaf is leaves and calls[path].input == shape:
            yield path


def check_size(name: str, image: Tensor, height: int, width: int) -> None:
    """Refuse an image of another size than the prompt was made for.

    Raises:
        GraftError: Names both sizes.
    """
    h, w = image.shape[-2:]
    if (h, w) != (height, width):
        raise GraftError(
            f"{name}: the prompt was made for images of {height} x {width} pixels and got {h} x {w}; resize the "
            "images, or attach with image_size= their size"
        )


class EnlargingFrame(nn.Module):
    """A learned frame of pixels around the image, which grows by ``2 * size`` pixels along both axes.

    Shapes: (N, channels, height, width) -> (N, channels, height + 2 size, width + 2 size).
    Parameters: ``2 * channels * size * (height + width + 2 * size)``.

    Args:
        size: Width of the frame in pixels (P).
        channels: Channels of the image.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        start: ``"random"``: U(0, 1), raw pixels that ImageNet's statistics normalise in every forward;
            ``"gaussian"``: N(0, 1), used as it is.
        name: The method, for the error.
    """

    def __init__(self, size: int, channels: int, height: int, width: int, *, start: str, name: str) -> None:
        super().__init__()
        self.height, self.width, self.name = height, width, name
        self.top_bottom = nn.Parameter(_drawn((1, channels, 2 * size, width + 2 * size), start))
        self.left_right = nn.Parameter(_drawn((1, channels, height, 2 * size), start))
        self.norm = ImageNetNorm(channels) if start == "random" else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Put the frame around (N, C, H, W)."""
        check_size(self.name, image, self.height, self.width)
        sides, ends = (
            self.norm(p).to(image.dtype).expand(image.shape[0], -1, -1, -1) for p in (self.left_right, self.top_bottom)
        )
        left, right = sides.chunk(2, 3)
        top, bottom = ends.chunk(2, 2)
        return torch.cat([top, torch.cat([left, image, right], 3), bottom], 2)


class PromptChannels(nn.Module):
    """Learned channels behind those of the image.

    Shapes: (N, channels, height, width) -> (N, channels + count, height, width).
    Parameters: ``count * height * width``.

    Args:
        count: Number of prompt channels (P).
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        start: ``"random"`` and ``"gaussian"`` as for :class:`EnlargingFrame`, with the mean of the statistics over the
            channels; a number v: U(-v, v), used as it is.
        name: The method, for the error.
    """

    def __init__(self, count: int, height: int, width: int, *, start: str | float, name: str) -> None:
        super().__init__()
        self.height, self.width, self.name = height, width, name
        self.prompt = nn.Parameter(_drawn((1, count, height, width), start))
        self.norm = ImageNetNorm(count, by_channel=False) if start == "random" else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Put the channels behind those of (N, C, H, W)."""
        check_size(self.name, image, self.height, self.width)
        prompt = self.norm(self.prompt).to(image.dtype).expand(image.shape[0], -1, -1, -1)
        return torch.cat([image, prompt], 1)


def _drawn(shape: tuple[int, ...], start: str | float) -> Tensor:
    values = torch.empty(shape)
    if start == "gaussian":
        return values.normal_()
    return values.uniform_(0, 1) if start == "random" else values.uniform_(-float(start), float(start))
