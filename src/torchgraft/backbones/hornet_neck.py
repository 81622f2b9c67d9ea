"""HorFPN: a feature pyramid whose output convolutions are gnConvs.

"HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", arXiv:2207.14284, section 3.3.
Maps C_0 ... C_(m-1) from high to low resolution:

    P_i = lateral_i(C_i) + nearest(P_(i+1))     1x1 convolutions to ``out_channels``, from the coarsest map upwards
    O_i = gnConv_i(P_i)                         in place of a 3x3 convolution; the gates are not scaled (s = 1)
    O_m = every second point of O_(m-1)         and so on for further outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GraftError
from .hornet import GnConv

__all__ = ["HorFPN"]

_FILTER_SIZE = (32, 17)
"""Stored size of the published neck's global filters."""


class HorFPN(nn.Module):
    """A neck for maps of any sizes, behind any backbone.

    Args:
        in_channels: Channels of the maps, from high to low resolution.
        out_channels: Channels of every output, a multiple of 2^(order - 1).
        num_outs: Number of outputs, at least that of the maps; each further one has half the size of the one before.
        order: Order n of the gnConvs.
        global_filter: Whether they have a global filter in place of a 7x7 convolution.
        dft_matmul: As for :class:`.hornet_filter.GlobalLocalFilter`.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: There is no map, there are fewer outputs than maps, or the order does not fit the channels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        order: int = 2,
        global_filter: bool = False,
        dft_matmul: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 1 <= len(in_channels) <= num_outs:
            raise GraftError(f"num_outs={num_outs} for {len(in_channels)} maps: expected at least one output per map")
        dd = {"device": device, "dtype": dtype}
        size = _FILTER_SIZE if global_filter else None
        self.num_outs = num_outs
        laterals: list[Any] = [nn.Conv2d(width, out_channels, 1, **dd) for width in in_channels]
        for conv in laterals:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.lateral_convs = nn.ModuleList(laterals)
        self.fpn_convs = nn.ModuleList(
            GnConv(out_channels, order, filter_size=size, dft_matmul=dft_matmul, **dd) for _ in in_channels
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, ``in_channels[i]``, H_i, W_i) to outputs (B, ``out_channels``, H_i, W_i).

        Raises:
            GraftError: The number of maps is another.
        """
        if len(maps) != len(self.lateral_convs):
            raise GraftError(f"{len(maps)} maps for a neck of {len(self.lateral_convs)}")
        merged = [lateral(found) for lateral, found in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        outputs = [conv(found) for conv, found in zip(self.fpn_convs, merged, strict=True)]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return outputs
