"""Convpass's bottleneck: 1 x 1, 3 x 3 and 1 x 1 convolutions over the grid of patches (arXiv 2207.07039)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ...core.layers import CONVS, make_activation
from ...core.placements import Layout

ConvInit = Literal["delta", "xavier"]


class ConvBypass(nn.Module):
    """``scale * drop_path(up(dropout(act(conv(act(down(x)))))))``.

    Tokens that are no patches are images of one pixel; on these only the centre of the kernel acts.

    Shapes: as ``layout`` says, (B, P + H W, d_in) -> (B, P + H W, d_out) and likewise for maps.
    Parameters: ``d_in h + h + K h^2 + h + h d_out + d_out`` with K the number of kernel taps.

    Args:
        d_in: Channels read.
        d_out: Channels returned.
        width: h.
        layout: How the tensor holds its channels.
        dims: Number of spatial dimensions.
        kernel: Side of the kernel, an odd number.
        stride: Of the convolution.
        act: Name of the activation a.
        dropout: In front of up, in training.
        drop_path: Chance that a sample skips the bypass, in training.
        scale: s.
        conv_init: ``"delta"``: the convolution starts as the identity; ``"xavier"``: Xavier-uniform.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        width: int,
        layout: Layout,
        *,
        dims: int = 2,
        kernel: int = 3,
        stride: int = 1,
        act: str = "quick_gelu",
        dropout: float = 0.1,
        drop_path: float = 0.0,
        scale: float = 1.0,
        conv_init: ConvInit = "delta",
    ) -> None:
        super().__init__()
        self.first = layout.name == "NC..."
        self.layout = Layout("N...C") if self.first else layout
        self.scale = scale
        self.down = nn.Linear(d_in, width)
        self.act = make_activation(act)
        self.conv = CONVS[dims, False](width, width, kernel, stride=stride, padding=kernel // 2)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, d_out)
        self.drop_path = DropPath(drop_path)
        self.centre = (slice(None), slice(None), *[kernel // 2] * dims)
        nn.init.xavier_uniform_(self.down.weight)
        if conv_init == "xavier":
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.zeros_(self.conv.weight)
            with torch.no_grad():
                self.conv.weight[self.centre] = torch.eye(width)
        nn.init.zeros_(self.up.weight)
        for layer in (self.down, self.conv, self.up):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the residual stream."""
        z = self.act(self.down(x.movedim(1, -1) if self.first else x))
        y = self.up(self.dropout(self.act(self._convolved(z))))
        y = self.scale * self.drop_path(y)
        return y.movedim(-1, 1) if self.first else y

    def _convolved(self, z: Tensor) -> Tensor:
        y = self.layout.from_map(self.conv(self.layout.to_map(z)))
        prefix = self.layout.prefix if self.layout.name == "NLC" else 0
        if not prefix:
            return y
        pixels = F.linear(z[:, :prefix], self.conv.weight[self.centre], self.conv.bias)
        return torch.cat([pixels, y[:, prefix:]], dim=1)
