"""Visual side: maps from high to low resolution, and embeddings of the image in CLIP's joint space.

Two trunks give the same thing:

* ``PooledTrunk``: any feature provider with a projector on its last map. With timm's ``resnet50_clip`` or
  ``resnet101_clip`` and CLIP's attention pool it is the image tower of the CLIP ResNets.
* ``ClipViT``: CLIP's vision transformer. Its embeddings are ``ln_post(tokens) @ proj``; four taps (B, C, H/16, W/16)
  are rescaled to strides 4, 8, 16 and 32.

Source: "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", arXiv 2112.01518.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ...backbones.features import FeatureProvider, create_features
from ...errors import GraftError
from .attention_pool import ConvProjector, DenseAttentionPool, PositionMode, resize_positions
from .transformer import Transformer

Projector = Literal["attnpool", "conv1x1"]


class VisualFeatures(NamedTuple):
    """What a trunk says about B images.

    Attributes:
        maps: (B, ``channels[i]``, H / ``strides[i]``, W / ``strides[i]``).
        pooled: Embeddings of the images (B, D).
        dense: Embeddings of the positions (B, D, h, w); h, w are those of the map ``dense_index``.
    """

    maps: list[Tensor]
    pooled: Tensor
    dense: Tensor


class PooledTrunk(nn.Module):
    """A feature provider with a projector on its last map.

    Args:
        provider: The maps.
        pool: From the last map to the pooled and the dense embeddings.
        embed_dim: Their width D.

    Attributes:
        channels: Channels of the maps.
        strides: Their strides.
        embed_dim: As given.
        dense_index: The map on whose grid the dense embeddings live.
    """

    def __init__(self, provider: FeatureProvider, pool: nn.Module, embed_dim: int) -> None:
        super().__init__()
        self.provider, self.pool = provider, pool
        self.channels, self.strides, self.embed_dim = provider.channels, provider.strides, embed_dim
        self.dense_index = len(self.channels) - 1

    def forward(self, x: Tensor) -> VisualFeatures:
        """Images (B, 3, H, W) to maps and embeddings."""
        maps = self.provider(x)
        return VisualFeatures(maps, *self.pool(maps[-1]))


def create_trunk(
    name: str,
    embed_dim: int,
    *,
    input_size: int = 512,
    projector: Projector = "attnpool",
    pos_mode: PositionMode = "resize",
    heads: int | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    **kwargs: Any,
) -> PooledTrunk:
    """A trunk on any backbone that gives feature maps; its projector starts from random weights.

    Args:
        name: A name of :func:`torchgraft.backbones.create_features`.
        embed_dim: Width D of the joint space.
        input_size: Side of the images in pixels; the grid of positions is this over the last stride.
        projector: CLIP's attention pool, or a 1x1 convolution.
        pos_mode: How the pool's positions fit a map of another size.
        heads: Heads of the pool; default: one per 64 channels, fewer where that does not divide them.
        pretrained: False starts from random weights.
        weights: A file for the backbone.
        **kwargs: For the backbone's constructor.

    Raises:
        GraftError: The backbone gives no maps, or the projector is unknown.
    """
    if projector not in get_args(Projector):
        raise GraftError(f"projector={projector!r}: expected one of {', '.join(get_args(Projector))}")
    provider = create_features(name, weights=weights, pretrained=pretrained, **kwargs)
    width, stride = provider.channels[-1], provider.strides[-1]
    if projector == "conv1x1":
        return PooledTrunk(provider, ConvProjector(width, embed_dim), embed_dim)
    heads = _heads(width) if heads is None else heads
    pool = DenseAttentionPool(max(1, input_size // stride), width, heads, embed_dim, pos_mode=pos_mode)
    return PooledTrunk(provider, pool, embed_dim)


def _heads(width: int) -> int:
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


class ClipViT(nn.Module):
    """CLIP's vision transformer with four rescaled taps; parameter names are those of OpenAI's weights.

    Args:
        patch_size: Side of a patch in pixels; the maps' strides are 1/4, 1/2, 1 and 2 times this.
        width: Channels C.
        layers: Blocks.
        heads: Attention heads.
        input_resolution: Side in pixels of the images that the position table is made for; others are interpolated.
        output_dim: Width D of the joint space.
        out_indices: The four blocks, from 0, whose outputs become maps.
        double_cls: Add the class embedding a second time, with the class token's position, as the published code does.

    Raises:
        GraftError: ``out_indices`` are not four rising blocks.

    Attributes:
        channels: Channels of the maps.
        strides: Their strides.
        embed_dim: D.
        dense_index: The map on whose grid the dense embeddings live.
    """

    dense_index = 2

    def __init__(
        self,
        *,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        input_resolution: int = 640,
        output_dim: int = 512,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        double_cls: bool = False,
    ) -> None:
        super().__init__()
        self.out_indices = tuple(out_indices)
        rising = list(self.out_indices) == sorted(set(self.out_indices))
        if len(self.out_indices) != 4 or not rising or not 0 <= self.out_indices[0] <= self.out_indices[-1] < layers:
            raise GraftError(f"out_indices={self.out_indices}: expected four rising blocks between 0 and {layers - 1}")
        self.channels = (width,) * 4
        self.strides = patch_size // 4, patch_size // 2, patch_size, 2 * patch_size
        self.embed_dim, self.double_cls = output_dim, double_cls
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((input_resolution // patch_size) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))
        self.fpn1 = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.GroupNorm(1, width), nn.ConvTranspose2d(width, width, 2, stride=2))
        self.fpn3 = nn.GroupNorm(1, width)
        self.fpn4 = nn.Sequential(nn.GroupNorm(1, width), nn.MaxPool2d(2, stride=2))

    def forward(self, x: Tensor) -> VisualFeatures:
        """Images (B, 3, H, W) to maps and embeddings; H and W are cut to whole patches."""
        patches = self.conv1(x)
        size = patches.shape[-2], patches.shape[-1]
        positions = resize_positions(self.positional_embedding, size)
        cls = self.class_embedding * (2 if self.double_cls else 1)
        tokens = torch.cat([cls.expand(len(x), 1, -1), patches.flatten(2).transpose(1, 2)], dim=1) + positions
        tokens, taps = self.transformer(self.ln_pre(tokens), taps=self.out_indices)
        rescale = self.fpn1, self.fpn2, self.fpn3, self.fpn4
        maps = [fpn(_grid(tap[:, 1:], size)) for fpn, tap in zip(rescale, taps, strict=True)]
        embedded = self.ln_post(tokens) @ self.proj
        return VisualFeatures(maps, embedded[:, 0], _grid(embedded[:, 1:], size))


def _grid(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h*w, C) to (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, size)
