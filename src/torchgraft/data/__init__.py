"""Labelled pictures for classification, detection and segmentation: loading, splitting and transforms."""

from .dataset import ClassificationData, ImageDataset, Skipped
from .dense import detect_task, load_detection, load_segmentation
from .detection import DetectionData
from .images import IMAGE_SUFFIXES, open_image
from .load import load_data
from .samples import SampleInfo, list_samples
from .segmentation import SegmentationData
from .splits import few_shot
from .transforms import Transforms, eval_transform_from, transforms_for

__all__ = [
    "IMAGE_SUFFIXES",
    "ClassificationData",
    "DetectionData",
    "ImageDataset",
    "SampleInfo",
    "SegmentationData",
    "Skipped",
    "Transforms",
    "detect_task",
    "eval_transform_from",
    "few_shot",
    "list_samples",
    "load_data",
    "load_detection",
    "load_segmentation",
    "open_image",
    "transforms_for",
]
