"""The bottleneck of all adapters (arXiv 1902.00751, 2005.00247, 2110.04366): what is added to a hidden vector."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.layers import make_activation

NormSide = Literal["none", "in", "out"]
Start = Literal["bert", "lora"]


class AdapterLayer(nn.Module):
    """``scale * up(dropout(act(down(x))))``, without the residual: placements add it.

    Acts on one axis, so the same layer serves tokens, channels-last maps and (N, C, *space) maps.

    Shapes: (..., d) -> (..., out), or (N, d, *space) -> (N, out, *space).
    Parameters: ``d width + width + width out + out`` (without biases ``(d + out) width``), 2 d more with a LayerNorm
    in front, 2 out more with one behind, 1 more with a learned scale.

    Args:
        d: Width of the vectors that are read.
        width: Bottleneck width r.
        out: Width of the hidden vector that is changed; default: d.
        act: Name of the activation f (:data:`torchgraft.core.layers.ACTIVATIONS`).
        layer_norm: A LayerNorm of its own: ``"in"`` in front, ``"out"`` behind the scale, or ``"none"``.
        scale: s; ``"learned"``: one number that starts at 1.
        dropout: Behind the activation, in training.
        init: ``"lora"``: down Kaiming-uniform, up zero, so the layer starts at zero; ``"bert"``: both N(0, 0.02).
            Biases are zero.
        bias: Whether down and up have one.
        axis: The axis of the vectors.
    """

    def __init__(
        self,
        d: int,
        width: int,
        *,
        out: int | None = None,
        act: str = "relu",
        layer_norm: NormSide = "none",
        scale: float | Literal["learned"] = 1.0,
        dropout: float = 0.0,
        init: Start = "bert",
        bias: bool = True,
        axis: int = -1,
    ) -> None:
        super().__init__()
        out = d if out is None else out
        self.layer_norm, self.axis = layer_norm, axis
        self.norm = nn.Identity() if layer_norm == "none" else nn.LayerNorm(d if layer_norm == "in" else out)
        self.down: nn.Module = nn.Linear(d, width, bias)
        self.act = make_activation(act)
        self.dropout = nn.Dropout(dropout)
        self.up: nn.Module = nn.Linear(width, out, bias)
        self.scale = nn.Parameter(torch.ones(())) if scale == "learned" else scale
        for layer in (self.down, self.up):
            _start(layer, "zero" if init == "lora" and layer is self.up else init)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the hidden vectors, for the vectors that are read."""
        if self.axis != -1:
            x = x.movedim(self.axis, -1)
        z = self.down(self.norm(x) if self.layer_norm == "in" else x)
        y = self.scale * self.up(self.dropout(self.act(z)))
        y = self.norm(y) if self.layer_norm == "out" else y
        return y if self.axis == -1 else y.movedim(-1, self.axis)


def _start(layer: nn.Module, init: Literal["bert", "lora", "zero"]) -> None:
    assert isinstance(layer, nn.Linear)
    if init == "bert":
        nn.init.normal_(layer.weight, std=0.02)
    elif init == "lora":
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    else:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
