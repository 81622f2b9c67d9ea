"""One layer of every kind that backbones are made of, with inputs of odd and even sizes."""

from __future__ import annotations

from collections.abc import Callable

import timm.layers as tl
import torch
from torch import nn

Make = Callable[[], nn.Module]

ODD, EVEN = (2, 4, 9, 7), (2, 4, 8, 10)

CONVS: dict[str, Make] = {
    "conv2d": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv2d, no padding": lambda: nn.Conv2d(4, 6, 3),
    "conv2d 1x1": lambda: nn.Conv2d(4, 6, 1),
    "conv2d, oblong kernel": lambda: nn.Conv2d(4, 6, (1, 5), padding=(0, 2)),
    "conv2d, stride 2": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv2d, patches": lambda: nn.Conv2d(4, 6, 2, stride=2),
    "conv2d, two groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "conv2d, depthwise": lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "conv2d, dilation 2": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "conv2d, padding='same'": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "conv2d, padding='same', dilation 2": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "conv2d, padding='valid'": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "conv2d, reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "conv2d, circular": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), stride=2, padding_mode="circular"),
    "conv2d, replicate, padding='same'": lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"),
    "timm same": lambda: tl.Conv2dSame(4, 6, 3),
    "timm same, stride 2": lambda: tl.Conv2dSame(4, 6, 3, stride=2),
    "timm same, even kernel, stride 2": lambda: tl.Conv2dSame(4, 6, 4, stride=2, groups=2),
    "timm same, dilation 2": lambda: tl.Conv2dSame(4, 6, 3, dilation=2),
    "weight-standardised": lambda: tl.StdConv2d(4, 6, 3, padding=1),
    "weight-standardised, same, stride 2": lambda: tl.StdConv2dSame(4, 6, 3, stride=2, padding="SAME"),
    "scaled weight-standardised": lambda: tl.ScaledStdConv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "scaled weight-standardised, same": lambda: tl.ScaledStdConv2dSame(4, 6, 3, stride=2, padding="SAME"),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "conv1d, stride 2, circular": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(4, 6, 3, padding=1),
    "conv3d, over time only": lambda: nn.Conv3d(4, 4, (3, 1, 1), stride=(1, 2, 2), padding=(1, 0, 0), groups=4),
    "transposed conv2d, stride 2": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
    "transposed conv2d, groups": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
    "transposed conv2d, output padding": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed conv1d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2),
}
NORMS: dict[str, Make] = {
    "batchnorm2d": lambda: nn.BatchNorm2d(4),
    "timm batchnorm with activation": lambda: tl.BatchNormAct2d(4),
    "groupnorm": lambda: nn.GroupNorm(2, 4),
    "timm layernorm2d": lambda: tl.LayerNorm2d(4),
    "layernorm": lambda: nn.LayerNorm(4),
}
OTHERS: dict[str, Make] = {
    "linear": lambda: nn.Linear(4, 6),
    "transformer encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
}
LAYERS: dict[str, Make] = CONVS | NORMS | OTHERS


def build(kind: str) -> nn.Module:
    """A layer of the kind, in eval mode, whose parameters and statistics are not those of a fresh one."""
    torch.manual_seed(0)
    layer = LAYERS[kind]().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in layer.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return layer


def inputs(kind: str) -> list[torch.Tensor]:
    """Inputs that the layer accepts: an odd and an even size for convolutions."""
    generator = torch.Generator().manual_seed(1)
    if kind in ("layernorm", *OTHERS):
        shapes: list[tuple[int, ...]] = [(2, 5, 4)]
    elif "1d" in kind:
        shapes = [(2, 4, 9), (2, 4, 8)]
    elif "3d" in kind:
        shapes = [(2, 4, 3, 7, 5), (2, 4, 4, 6, 8)]
    else:
        shapes = [ODD, EVEN]
    return [torch.randn(shape, generator=generator) for shape in shapes]
