"""Dense prediction: modules that sit between, behind and beside the stages of a backbone, and their losses."""

from __future__ import annotations

from .box_loss import box_cross_entropy
from .lv_adapter import LanguageToVision, LevelAdapter, MultiScaleAdapter, alignment_loss, box_alignment_loss, task_rows
from .pixel_loss import pixel_cross_entropy
from .region_attention import DiscriminativeCrossAttention
from .rsseg import RSSegHead, region_loss, rsseg_loss
from .separation import SpatiallyAdaptiveSeparation, TwoPathway
from .spm import PromptMatcher, StagePromptMatching, interim_loss

__all__ = [
    "DiscriminativeCrossAttention",
    "LanguageToVision",
    "LevelAdapter",
    "MultiScaleAdapter",
    "PromptMatcher",
    "RSSegHead",
    "SpatiallyAdaptiveSeparation",
    "StagePromptMatching",
    "TwoPathway",
    "alignment_loss",
    "box_alignment_loss",
    "box_cross_entropy",
    "interim_loss",
    "pixel_cross_entropy",
    "region_loss",
    "rsseg_loss",
    "task_rows",
]
