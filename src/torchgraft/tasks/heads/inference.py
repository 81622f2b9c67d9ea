"""Segmenting images of any size: at once, in windows that overlap, and several times at other sizes and mirrored.

A network is any callable from images (B, C, h, w) to logits (B, K, h', w'); put it in evaluation mode first. Logits are
resized bilinearly with align_corners=False. With W the windows that cover a pixel,

    sliding:     logits(pixel) = sum over W of logits_W(pixel) / |W|
    augmented:   p = mean over scales s, and mirrored or not, of softmax(unmirror(resize(predict(resize_s(x)))))

Windows of ``crop`` stand every ``stride`` points, the last moved back to the border; an image that is smaller than the
crop is one window of its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import GraftError
from .conv_norm import resized

__all__ = ["augmented_inference", "sliding_inference", "whole_inference"]

Network = Callable[[Tensor], Tensor]
Size = int | tuple[int, int]


@torch.no_grad()
def whole_inference(network: Network, images: Tensor) -> Tensor:
    """Logits (B, K, H, W) of images (B, C, H, W), in float32 at least, in one forward."""
    return _full_size(network, images)


@torch.no_grad()
def sliding_inference(network: Network, images: Tensor, crop: Size, stride: Size) -> Tensor:
    """Logits (B, K, H, W) of images (B, C, H, W), in float32 at least, from overlapping windows.

    Args:
        network: Sees one window of all images at a time.
        images: (B, C, H, W).
        crop: Height and width of a window in points, or one number for both.
        stride: Steps between windows, down and across.

    Raises:
        GraftError: A number is not positive, or the stride is above the crop, so that points would be left out.
    """
    (high, wide), (down, across) = _pair("crop", crop), _pair("stride", stride)
    if down > high or across > wide:
        raise GraftError(f"stride={stride} is above crop={crop}: points between the windows would be left out")
    height, width = images.shape[-2:]
    total: Tensor | None = None
    count = images.new_zeros(height, width, dtype=torch.float32)
    for rows in _windows(height, high, down):
        for columns in _windows(width, wide, across):
            logits = _full_size(network, images[..., rows, columns])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    assert total is not None  # there is at least one window
    return total / count


@torch.no_grad()
def augmented_inference(
    predict: Network, images: Tensor, *, scales: Sequence[float] = (1.0,), flip: bool = False
) -> Tensor:
    """Class probabilities (B, K, H, W), averaged over scaled and mirrored versions of images (B, C, H, W).

    Args:
        predict: The network, or one of the functions above with a network filled in.
        images: (B, C, H, W).
        scales: Factors of the size; images are resized with antialiasing, as in training.
        flip: Whether every scale is also seen mirrored, left to right.

    Raises:
        GraftError: There is no scale, or one is not positive.
    """
    if not scales or min(scales) <= 0:
        raise GraftError(
            f"scales={list(scales)}: expected one factor or more, all above 0, for example (0.75, 1, 1.25)"
        )
    size = images.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        scaled = _scaled(images, [max(1, round(side * scale)) for side in size])
        for mirrored in (False, True) if flip else (False,):
            logits = _at_least_float32(predict(scaled.flip(-1) if mirrored else scaled))
            probabilities = resized(logits, size).softmax(1)
            probabilities = probabilities.flip(-1) if mirrored else probabilities
            total = probabilities if total is None else total + probabilities
    assert total is not None  # there is at least one scale
    return total / (len(scales) * (2 if flip else 1))


def _full_size(network: Network, images: Tensor) -> Tensor:
    return resized(_at_least_float32(network(images)), images.shape[-2:])


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.element_size() >= 4 else logits.float()


def _scaled(images: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def _windows(side: int, crop: int, stride: int) -> Iterator[slice]:
    for index in range(max(0, -(-(side - crop) // stride)) + 1):
        end = min(index * stride + crop, side)
        yield slice(max(0, end - crop), end)


def _pair(name: str, size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise GraftError(f"{name}={size}: expected a number of points, or (height, width), at least 1")
    return pair
