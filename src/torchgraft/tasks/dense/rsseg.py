"""RSSeg: a segmentation head that keeps apart what plain transformers make alike.

A re-design after the abstract of "Representation Separation for Semantic Segmentation with Vision Transformers",
arXiv:2212.13764, whose code was not found. The abstract states the idea: features of patches become alike with depth;
so a pathway beside the transformer carries the discrepancy of local patches (:class:`.TwoPathway`), a module separates
neighbours (:class:`.SpatiallyAdaptiveSeparation`), and class queries make regions discriminative under losses of their
own (:class:`.DiscriminativeCrossAttention`). The classes have the paper's names; their internals are ours.

    U = pathway(G_0 ... G_n)                         (B, d, h, w)
    Y = separation(U)
    mask, attention, regions = cross-attention(Y)
    logits = mask + pixel(Y)                         (B, K, h, w)
    L = CE(logits) + 0.4 mean over layers of CE(attention) + 0.4 L_region

L_region: for every image and every class that its labels hold, the cross-entropy of that class's row of the region
logits; classes that an image lacks do not count.

Parameters for a width D of all taps: those of the three parts, and d K + K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ...errors import GraftError
from .pixel_loss import IGNORE_INDEX, pixel_cross_entropy
from .region_attention import DiscriminativeCrossAttention
from .separation import PathwayBlock, SpatiallyAdaptiveSeparation, TwoPathway

__all__ = ["AUXILIARY_WEIGHT", "RSSegHead", "RSSegLoss", "RSSegOutput", "region_loss", "rsseg_loss"]

AUXILIARY_WEIGHT = 0.4
"""Weight of every auxiliary loss; ours, the usual one."""


class RSSegOutput(NamedTuple):
    """What the head returns; every map has the size of the finest tap.

    Attributes:
        logits: Segmentation logits (B, K, h, w).
        attention: Attention logits (B, K, h, w) of every layer.
        region_logits: (B, K, K).
        mask: The part of the logits that the class queries give (B, K, h, w).
        fused: U (B, d, h, w).
        separated: Y (B, d, h, w).
        tap_logits: Logits of the linear classifier on the last tap (B, K, h_n, w_n), or None without it.
    """

    logits: Tensor
    attention: list[Tensor]
    region_logits: Tensor
    mask: Tensor
    fused: Tensor
    separated: Tensor
    tap_logits: Tensor | None


class RSSegLoss(NamedTuple):
    """The loss and its parts before their weights, scalars; ``tap`` is 0 without a classifier on the last tap."""

    loss: Tensor
    mask: Tensor
    attention: Tensor
    region: Tensor
    tap: Tensor


class RSSegHead(nn.Module):
    """Maps of a backbone to segmentation logits.

    On a plain ViT the maps are G_0, which is patch embedding and positions, and the outputs of n groups of blocks of
    equal depth, all without class and register tokens. On a pyramid G_0 is the stem's output, and the taps are those of
    the stages from high to low resolution; where only the stages are at hand, the finest of them can be given twice.

    Args:
        in_channels: Channels of G_0, G_1, ... G_n.
        num_classes: K.
        dim: Width d; default: 256 where all maps have the same channels, a ViT, and 128 for a pyramid.
        key_dim: Width e of the keys that weigh neighbours; default: a quarter of d.
        kernel: Side of the neighbourhood, odd.
        layers: Layers of the cross-attention.
        heads: Its heads.
        signed: See :class:`.SpatiallyAdaptiveSeparation`.
        detach: Whether no gradient goes into the maps. False where the backbone, or an adapter in it, trains.
        tap_classifier: Whether a linear classifier on the last tap is trained beside; only of use without ``detach``.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: There is no tap, the heads do not divide the width, or the kernel is even.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        dim: int | None = None,
        key_dim: int | None = None,
        kernel: int = 3,
        layers: int = 2,
        heads: int = 8,
        signed: bool = False,
        detach: bool = True,
        tap_classifier: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(in_channels) < 2:
            raise GraftError(f"RSSeg: in_channels={list(in_channels)}: expected those of G_0 and of at least one tap")
        dim = dim if dim is not None else 256 if len(set(in_channels)) == 1 else 128
        dd = {"device": device, "dtype": dtype}
        self.in_channels, self.num_classes, self.detach = tuple(in_channels), num_classes, detach
        self.path = TwoPathway(in_channels, dim, **dd)
        self.sasm = SpatiallyAdaptiveSeparation(dim, key_dim or max(1, dim // 4), kernel, signed, **dd)
        self.dca = DiscriminativeCrossAttention(dim, num_classes, layers, heads, **dd)
        self.pixel = nn.Conv2d(dim, num_classes, 1, **dd)
        self.tap_classifier = nn.Conv2d(in_channels[-1], num_classes, 1, **dd) if tap_classifier else None
        self.apply(_initialise)
        for block in self.path.blocks:
            assert isinstance(block, PathwayBlock)
            nn.init.zeros_(block.fc2.weight)

    def forward(self, maps: Sequence[Tensor]) -> RSSegOutput:
        """Maps G_0 ... G_n, (B, ``in_channels[i]``, h_i, w_i) with the finest tap first, to the logits.

        Raises:
            GraftError: The number of maps, or the channels of one, is another; or a tap is finer than the first.
        """
        self._check(maps)
        if self.detach:
            maps = [found.detach() for found in maps]
        path = self.path(maps)
        separated = self.sasm(path.fused).output
        regions = self.dca(separated)
        return RSSegOutput(
            logits=regions.mask + self.pixel(separated),
            attention=regions.attention,
            region_logits=regions.region_logits,
            mask=regions.mask,
            fused=path.fused,
            separated=separated,
            tap_logits=None if self.tap_classifier is None else self.tap_classifier(maps[-1]),
        )

    def _check(self, maps: Sequence[Tensor]) -> None:
        found = tuple(each.shape[1] for each in maps)
        if found != self.in_channels:
            raise GraftError(
                f"RSSeg: maps of {list(found)} channels: expected {list(self.in_channels)}, G_0 and then the taps"
            )
        sizes = [tuple(each.shape[-2:]) for each in maps[1:]]
        if any(size[0] > sizes[0][0] or size[1] > sizes[0][1] for size in sizes):
            raise GraftError(f"RSSeg: taps of the sizes {sizes}: give them from high to low resolution")


def rsseg_loss(output: RSSegOutput, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> RSSegLoss:
    """The loss of the module's equation.

    Args:
        output: What the head returned.
        labels: Integers (B, H, W); ``ignore_index`` does not count.
        ignore_index: Label of the pixels that do not count.

    Raises:
        GraftError: The shapes do not belong together.
    """
    mask = pixel_cross_entropy(output.logits, labels, ignore_index=ignore_index)
    layers = [pixel_cross_entropy(each, labels, ignore_index=ignore_index) for each in output.attention]
    attention, region = torch.stack(layers).mean(), region_loss(output.region_logits, labels, ignore_index=ignore_index)
    tap = torch.zeros_like(mask)
    if output.tap_logits is not None:
        tap = pixel_cross_entropy(output.tap_logits, labels, ignore_index=ignore_index)
    return RSSegLoss(mask + AUXILIARY_WEIGHT * (attention + region + tap), mask, attention, region, tap)


def region_loss(region_logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The mean, over the classes that each image holds, of the cross-entropy of their rows; 0 when there is none.

    Args:
        region_logits: (B, K, K).
        labels: Integers (B, H, W).
        ignore_index: Label of the pixels that do not count.
    """
    classes = region_logits.shape[1]
    present = torch.zeros(len(labels), classes + 1, dtype=torch.bool, device=labels.device)
    present.scatter_(1, labels.long().masked_fill(labels == ignore_index, classes).flatten(1), True)
    present = present[:, :classes]
    precise = region_logits if region_logits.element_size() >= 4 else region_logits.float()
    target = torch.arange(classes, device=labels.device).expand(len(labels), -1)
    rows = F.cross_entropy(precise.transpose(1, 2), target, reduction="none")
    return (rows * present).sum() / present.sum().clamp(min=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
