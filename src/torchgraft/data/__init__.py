"""Labelled pictures for classification: loading, splitting, few-shot selection and transforms."""

from .dataset import ClassificationData, ImageDataset, Skipped
from .images import IMAGE_SUFFIXES, open_image
from .load import load_data
from .samples import SampleInfo, list_samples
from .splits import few_shot
from .transforms import Transforms, eval_transform_from, transforms_for

__all__ = [
    "IMAGE_SUFFIXES",
    "ClassificationData",
    "ImageDataset",
    "SampleInfo",
    "Skipped",
    "Transforms",
    "eval_transform_from",
    "few_shot",
    "list_samples",
    "load_data",
    "open_image",
    "transforms_for",
]
