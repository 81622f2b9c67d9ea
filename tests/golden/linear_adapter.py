"""The linear form of the published adapter, which stands beside CLIP's attention pooling only.

``scale * fc2(act(fc1(x)))`` over the last axis. The library adapts maps and token grids; this one place reads
a pooled token sequence, so its form lives with the CLIP host that is built for the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchgraft.core.layers import make_activation


class LinearAdapter(nn.Module):
    """(..., in_features) -> (..., out_features); ``scale`` multiplies after the second linear layer."""

    def __init__(self, in_features: int, out_features: int, width: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, width)
        self.act = make_activation(act)
        self.fc2 = nn.Linear(width, out_features)
        self.scale = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fc2(self.act(self.fc1(x)))
