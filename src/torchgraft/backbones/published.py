"""What was published about a backbone of a given size, beside what we count: one record per registered name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Figures of one size.

    Attributes:
        parameters: Parameters with a head of 1000 classes. The tests compare them with the built model.
        gmacs: Multiply-adds of convolutions and linear layers in one forward of one image, in units of 1e9.
        channels: Channels of the maps, from high to low resolution.
        strides: Strides of these maps.
        top1: Published ImageNet-1K accuracy in per cent, None where none is known to us.
        side: Side of the images, in pixels, for ``gmacs`` and ``top1``.
        data: What the weights behind ``top1`` were trained on before ImageNet-1K; empty: nothing.
    """

    parameters: int
    gmacs: float
    channels: tuple[int, ...]
    strides: tuple[int, ...] = (4, 8, 16, 32)
    top1: float | None = None
    side: int = 224
    data: str = ""
