"""The Conv-Adapter bottleneck: grouped K x K convolution, activation, 1 x 1 convolution, channel scale."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...core.layers import CONVOLVE, CONVS, ConvGeometry, make_activation
from .grouped import sum_groups

Init = Literal["zero", "default", "kaiming", "trunc", "fan_out"]


class ConvBottleneck(nn.Module):
    """``scale * conv2(act(conv1(u)))`` (arXiv 2208.07463).

    ``conv1`` slides like the convolution it stands beside and has as many groups as outputs, so each of its
    ``width`` outputs reads its own run of ``in_channels / width`` consecutive channels. ``conv2`` is 1 x 1.
    Both have a bias; there is no norm.

    Shapes: (N, in_channels, *space) -> (N, out_channels, *space'), with space' that of ``geometry``.
    Parameters: ``in*K + width + width*out + 2*out`` with K the number of kernel taps.

    Args:
        in_channels: Channels read.
        out_channels: Channels returned.
        width: Bottleneck width; divides ``in_channels`` (see :func:`bottleneck_width`).
        geometry: How ``conv1`` slides.
        act: Name of the activation (:data:`torchgraft.core.layers.ACTIVATIONS`).
        init: ``"zero"``: conv2 zero and scale one, so the branch starts at zero. The others start as the
            official code does on its hosts: ``"default"`` (PyTorch's own; BiT, Swin), ``"kaiming"`` (normal,
            fan out, zero bias; ResNet), ``"trunc"`` (truncated normal 0.02, zero bias; ConvNeXt), ``"fan_out"``
            (normal sqrt(2 / (k k out / groups)), zero bias; EfficientNet).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        geometry: ConvGeometry,
        *,
        act: str = "relu",
        init: Init = "zero",
    ) -> None:
        super().__init__()
        self.conv1 = sum_groups(geometry.build(in_channels, width, groups=width))
        self.act = make_activation(act)
        self.conv2: _ConvNd = CONVS[geometry.dims, False](width, out_channels, 1)
        self.scale = nn.Parameter(torch.ones(out_channels, *[1] * geometry.dims))
        self.reset(init)

    def reset(self, init: Init) -> None:
        """Draw the start values again."""
        nn.init.ones_(self.scale)
        for conv in (self.conv1, self.conv2):
            conv.reset_parameters()
            if init == "kaiming":
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            elif init == "trunc":
                nn.init.trunc_normal_(conv.weight, std=0.02)
            elif init == "fan_out":
                taps = math.prod(conv.kernel_size)
                nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (taps * conv.out_channels / conv.groups)))
            if init in ("kaiming", "trunc", "fan_out"):
                _zero(conv.bias)
        if init == "zero":
            nn.init.zeros_(self.conv2.weight)
            _zero(self.conv2.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Map (N, C_in, *space) to (N, C_out, *space')."""
        h = self.act(self.conv1(u))
        # The scale of the output is that of the 1 x 1 kernel's rows: so nothing of the output's size is kept for it.
        weight, bias = self.conv2.weight, self.conv2.bias
        assert bias is not None
        scale = self.scale
        return CONVOLVE[scale.dim() - 1](h, weight * scale.unsqueeze(1), bias * scale.flatten())


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)


def bottleneck_width(in_channels: int, reduction: float) -> int:
    """The largest divisor of ``in_channels`` that is at most ``in_channels / reduction`` (at least 1)."""
    limit = max(1, int(in_channels / reduction))
    return next(w for w in range(limit, 0, -1) if in_channels % w == 0)
