"""Feature taps of timm's GhostNets at the last block of every level.

timm (1.0.31) taps the first block of a level, the one that halves the map. A dense model built from these taps ends
at the first block of the last level, and what the network learns behind it is cut off; its map of stride 16 has 80
channels where the level ends with 112. ("GhostNet", arXiv:1911.11907; versions 2 and 3 and RepGhost are built alike.)
"""

from __future__ import annotations

from typing import Any

from timm.models.ghostnet import GhostNet
from timm.models.repghost import RepGhostNet
from torch import nn

__all__ = ["correct_taps"]


def correct_taps(model: nn.Module) -> nn.Module:
    """Tap the last block of every level of a GhostNet; leave any other model, and corrected taps, as they are.

    Args:
        model: A whole model, not yet pruned. It is changed in place: ``feature_info`` and ``stage_ends``, which
            ``forward_intermediates`` and both wrappers of ``features_only`` read. No parameter is.

    Returns:
        The same model.
    """
    if not isinstance(model, (GhostNet, RepGhostNet)):
        return model
    groups: list[Any] = list(model.blocks)[:-1]  # the last one is a 1x1 convolution of the head
    starts = [i for i, group in enumerate(groups) if group[0].stride > 1]
    ends = [start - 1 for start in starts[1:]] + [len(groups) - 1]
    model.stage_ends = [-1, *ends]
    model.feature_info[1:] = [
        {"num_chs": groups[end][-1].ghost2.out_chs, "reduction": 2 ** (level + 2), "module": f"blocks.{end}"}
        for level, end in enumerate(ends)
    ]
    return model
