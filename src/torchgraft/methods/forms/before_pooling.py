"""The BatchNorm that the published Conv-Adapter code puts in front of a ResNet's pooling, in every mode."""

from __future__ import annotations

from torch import nn

from ...core.anatomy import Anatomy
from ...core.placements import Point, Sequential
from ...swap import original_class


def block_family(anatomy: Anatomy) -> str:
    """The library file that defines the blocks, such as ``resnet`` or ``convnext``; empty without blocks."""
    if not anatomy.blocks:
        return ""
    block = original_class(anatomy.module(anatomy.blocks[0].path))
    return block.__module__.rpartition(".")[2]


def norm_before_pooling(anatomy: Anatomy) -> Sequential:
    """A new BatchNorm on the last map; with its statistics at 0 and 1 it changes nothing at the start."""
    end = Point(anatomy.stages[-1].root, "output")
    return Sequential(nn.BatchNorm2d(anatomy.shape(end)[1]), end, skip=False, slot="norm")
