"""RepNet's side network: pooling, a K x K convolution, a 1 x 1 convolution, and back to the size of the target."""

from __future__ import annotations

import math
from typing import Any

from timm.layers import make_divisible
from torch import Tensor, nn
from torch.nn import functional as F


class StandardisedConv2d(nn.Conv2d):
    """A convolution with ``(w - mean) / (std + eps)`` per filter as its weight; std is the unbiased one.

    Args:
        *args: As for ``nn.Conv2d``; also the keyword arguments.
        eps: Added to the standard deviation.
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, H, W)."""
        filters = self.weight.flatten(1)
        standard = (filters - filters.mean(1, keepdim=True)) / (filters.std(1, keepdim=True) + self.eps)
        return self._conv_forward(x, standard.view_as(self.weight), self.bias)


class ProgramModule(nn.Module):
    """One side: ``up(bn2 W2 relu(bn1 W1 pool(u)))``.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H / r, W / r) with r = ``shrink * ratio``.
    Parameters: ``k k in m / groups + 2 m + m out + 2 out``, m = ``in_channels * expand`` to a multiple of 8.

    Args:
        in_channels: Channels read.
        out_channels: Channels returned.
        expand: Width of the middle as a multiple of ``in_channels``.
        kernel: Kernel size of the first convolution.
        groups: Its groups.
        pool: The map is average-pooled by this factor before it (maps smaller than that are not).
        ratio: Input size over output size.
        shrink: Average-pool by this factor before everything else; the side that reads the image.
        ceil: Round sizes up where ``ratio`` and ``shrink`` do not divide them, as padded layers do.
        times: The result is multiplied by this.
        standardise: Use :class:`StandardisedConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expand: float = 1.0,
        kernel: int = 5,
        groups: int = 2,
        pool: int = 2,
        ratio: int = 1,
        shrink: int = 1,
        ceil: bool = False,
        times: int = 1,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.pool, self.ratio, self.shrink, self.ceil, self.times = pool, ratio, shrink, ceil, times
        width = make_divisible(int(in_channels * expand), 8)
        conv = StandardisedConv2d if standardise else nn.Conv2d
        self.conv1 = conv(in_channels, width, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self.conv2 = conv(width, out_channels, 1, bias=False)
        self.final_bn = nn.BatchNorm2d(out_channels, eps=1e-3)
        for layer in (self.conv1, self.conv2):
            # He, fan out, as published: groups are not counted.
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (math.prod(layer.kernel_size) * layer.out_channels)))
        nn.init.zeros_(self.final_bn.weight)

    def forward(self, u: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / r, W / r)."""
        if self.shrink > 1:
            u = F.avg_pool2d(u, self.shrink, ceil_mode=self.ceil)
        height, width = u.shape[-2:]
        size = [-(-s // self.ratio) if self.ceil else s // self.ratio for s in (height, width)]
        if min(height, width) >= self.pool:
            u = F.avg_pool2d(u, self.pool)
        y = self.final_bn(self.conv2(F.relu(self.bn1(self.conv1(u)))))
        y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        return y if self.times == 1 else self.times * y
