"""1 x 1 convolutions as linear layers: the pixels that they read, with the channels last."""

from __future__ import annotations

import math

from torch import Tensor

from ...core.layers import ConvGeometry


def pixels_read(x: Tensor, geometry: ConvGeometry) -> Tensor | None:
    """What a 1 x 1 convolution reads, so that a linear map of the last axis does what the convolution would.

    A stride skips pixels before anything is computed. That also keeps clear of oneDNN's gradient for the weight of a
    1 x 1 convolution with a stride in channels-last memory (CPU, torch 2.14), which writes out of bounds.

    Args:
        x: (N, C, *space).
        geometry: How the convolution slides.

    Returns:
        (N, *space', C); None where the convolution has a larger kernel, is transposed, or pads.
    """
    padded = not isinstance(geometry.padding, str) and any(geometry.padding)  # the rules of "same" pad nothing here
    if math.prod(geometry.kernel) > 1 or geometry.transposed or padded:
        return None
    for axis, step in enumerate(geometry.stride, start=2):
        x = x[(slice(None),) * axis + (slice(None, None, step),)]
    return x.movedim(1, -1)
