"""The linear bottleneck: down, activation, up, and a scale per channel; the last axis holds the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.layers import make_activation


class LinearBottleneck(nn.Module):
    """``scale * fc2(act(fc1(x)))``: the form of Conv-Adapter where there is no space, beside attention pooling.

    Shapes: (..., in_features) -> (..., out_features).
    Parameters: ``in*width + width + width*out + 2*out``.

    Args:
        in_features: Width read.
        out_features: Width returned.
        width: Bottleneck width.
        act: Name of the activation (:data:`torchgraft.core.layers.ACTIVATIONS`).
        zero: Start at zero: fc2 zero, scale one. Otherwise PyTorch's own start.
    """

    def __init__(
        self, in_features: int, out_features: int, width: int, *, act: str = "relu", zero: bool = True
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, width)
        self.act = make_activation(act)
        self.fc2 = nn.Linear(width, out_features)
        self.scale = nn.Parameter(torch.ones(out_features))
        if zero:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self.scale * self.fc2(self.act(self.fc1(x)))
