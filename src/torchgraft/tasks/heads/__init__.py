"""Heads that turn the maps of a backbone into a segmentation, how images of any size go through them, and scores."""

from __future__ import annotations

from .fcn import FCN, Auxiliary, Linear
from .inference import augmented_inference, sliding_inference, whole_inference
from .scores import SegmentationReport, SegmentationScores
from .segmentation import HEADS, segmentation_head
from .semantic_fpn import FeaturePyramid, SemanticFPN, SemanticFPNHead
from .upernet import UPerNet

__all__ = [
    "FCN",
    "HEADS",
    "Auxiliary",
    "FeaturePyramid",
    "Linear",
    "SegmentationReport",
    "SegmentationScores",
    "SemanticFPN",
    "SemanticFPNHead",
    "UPerNet",
    "augmented_inference",
    "segmentation_head",
    "sliding_inference",
    "whole_inference",
]
