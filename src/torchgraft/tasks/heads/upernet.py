"""UPerNet: a pyramid whose coarsest level has been pooled over regions of several sizes.

"Unified Perceptual Parsing for Scene Understanding", arXiv:1807.10221, without its further tasks; the pooling is that
of "Pyramid Scene Parsing Network", arXiv:1612.01105. For maps C_0 ... C_(m-1), high to low resolution, with ConvNorm a
convolution, a norm and a ReLU, and ``up`` bilinear resizing with align_corners=False:

    L_(m-1) = ConvNorm3x3([C_(m-1) ; up(ConvNorm1x1(pool_p(C_(m-1)))) for p in 1, 2, 3, 6])
    L_i     = ConvNorm1x1_i(C_i) + up(L_(i+1))                                   i = m-2 ... 0
    P_i     = ConvNorm3x3_i(L_i),   P_(m-1) = L_(m-1)
    logits  = W_seg * dropout(ConvNorm3x3([up(P_0) ; ... ; up(P_(m-1))]))        all at the size of C_0

pool_p is adaptive average pooling to p x p. With one map only the pooling is left. Parameters with D channels, c =
C_(m-1), q pools, K classes and batch norm: q (c D + 2 D) + 9 (c + q D) D + 2 D, then C_i D + 9 D^2 + 4 D for every
other level, then 9 m D^2 + 2 D + D K + K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .conv_norm import ConvNorm, Norm, check_channels, check_maps, classifier, resized

__all__ = ["UPerNet"]

WIDTH = 512
POOLS = (1, 2, 3, 6)


class UPerNet(nn.Module):
    """The head on all maps of a backbone.

    Args:
        channels: Channels of the maps, from high to low resolution.
        num_classes: K.
        width: Channels D.
        pools: Sizes to which the coarsest map is pooled.
        norm: Norm of the convolutions. Batch norm cannot train on one image, because of the 1x1 pool.
        dropout: Probability with which a channel is dropped before the last convolution.

    Raises:
        GraftError: There is no map, or the width or norm is unknown.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        width: int = WIDTH,
        pools: Sequence[int] = POOLS,
        norm: Norm = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels = check_channels(channels)
        *finer, coarsest = self.channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), ConvNorm(coarsest, width, 1, norm)) for pool in pools
        )
        self.bottleneck = ConvNorm(coarsest + len(pools) * width, width, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvNorm(c, width, 1, norm) for c in finer)
        self.fpn_convs = nn.ModuleList(ConvNorm(width, width, 3, norm) for _ in finer)
        self.fpn_bottleneck = ConvNorm(len(self.channels) * width, width, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, ``channels[i]``, h_i, w_i) to logits (B, K, h_0, w_0).

        Raises:
            GraftError: The maps are not those that the head was built for, or batch norm would train on one value.
        """
        check_maps(maps, self.channels)
        *finer, coarsest = maps
        merged = [lateral(found) for lateral, found in zip(self.lateral_convs, finer, strict=True)]
        merged.append(self._pooled(coarsest))
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + resized(merged[i], merged[i - 1].shape[-2:])
        levels = [conv(found) for conv, found in zip(self.fpn_convs, merged[:-1], strict=True)]
        levels.append(merged[-1])
        size = maps[0].shape[-2:]
        whole = self.fpn_bottleneck(torch.cat([resized(level, size) for level in levels], 1))
        return self.conv_seg(self.dropout(whole))

    def _pooled(self, x: Tensor) -> Tensor:
        pooled = [resized(module(x), x.shape[-2:]) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], 1))
