"""The image tower of the CLIP ResNets with the official parameter names, as a plain backbone.

Three stem convolutions and an average pool; bottlenecks that down-sample by average pooling after the 3x3
convolution and in the skip; attention pooling whose query is the mean of the map. Two things differ from the
public CLIP weights: the 1x1 convolution of a skip has a bias, and the attention pool is a module of its own
whose parts (``tokens``, ``attend``) can be adapted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClipBottleneck(nn.Module):
    """1x1, 3x3, average pool, 1x1; the stride sits in the pools."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu3 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            # The official names: the pool is called "-1", so that the convolution stays "0".
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(in_channels, out_channels, 1, bias=True)),
                        ("1", nn.BatchNorm2d(out_channels)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.avgpool(self.relu2(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return self.relu3(y + (x if self.downsample is None else self.downsample(x)))


class PositionedTokens(nn.Module):
    """(B, C, H, W) -> (1 + H*W, B, C): the mean token first, position embedding added."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)
        return torch.cat([tokens.mean(dim=0, keepdim=True), tokens]) + positions[:, None, :]


class ClipAttentionPool(nn.Module):
    """Multi-head attention over the positioned tokens; token 0 of the output is the image feature."""

    def __init__(self, side: int, width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)
        self.heads = heads
        self.tokens = PositionedTokens()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x, self.positional_embedding)
        q, k, v = (self._split(proj(tokens)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1 + H*W, width / heads)
        return self.c_proj(attended.permute(2, 0, 1, 3).flatten(2))[0]

    def _split(self, x: Tensor) -> Tensor:
        length, batch, width = x.shape
        return x.reshape(length, batch, self.heads, width // self.heads).permute(1, 2, 0, 3)


class ClipResNet(nn.Module):
    """The whole tower; ``width`` is the stem width, the last map has ``32 * width`` channels."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["width"]
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for i, depth in enumerate(config["layers"]):
            planes, blocks = width * 2**i, []
            for j in range(depth):
                blocks.append(ClipBottleneck(channels, planes, 2 if i > 0 and j == 0 else 1))
                channels = planes * ClipBottleneck.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        side = config["image_size"] // 2 ** (len(config["layers"]) + 1)
        self.attnpool = ClipAttentionPool(side, channels, config["heads"], config["output_dim"])
        self.depth = len(config["layers"])
        self.image_size = config["image_size"]
        self.classifier = nn.Identity()  # the tower itself classifies nothing

    def get_classifier(self) -> nn.Module:
        """Where a head goes."""
        return self.classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.avgpool(self.relu3(self.bn3(self.conv3(x))))
        for i in range(self.depth):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.classifier(self.attnpool(x))
