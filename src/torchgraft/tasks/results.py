"""What training, evaluation and prediction give back: plain records that go to JSON and come back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import GraftError


@dataclass(frozen=True)
class Mistake:
    """An image of the held-out part that was classified wrongly.

    Attributes:
        id: The image's name in the data set.
        true: Its class.
        predicted: The class that came first.
        confidence: Probability of the predicted class, 0 to 1.
    """

    id: str
    true: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class EvalResult:
    """Scores of an adapter on one part of a data set.

    Attributes:
        data: Name of the data set.
        part: ``test``, ``val`` or ``train``.
        n: Number of images.
        accuracy: Top-1, 0 to 1.
        top5: Top-5, 0 to 1; None with five classes or fewer.
        loss: Mean cross-entropy, nats.
        classes: Class names, in the order of the matrix.
        per_class: Accuracy of each class; None for a class without images.
        confusion: Row: true class, column: predicted class, in images.
        worst: Wrong predictions, the most confident first.
        skipped: Unreadable images that were left out, with the reason.
        seconds: Wall-clock time of the predictions.
    """

    data: str
    part: str
    n: int
    accuracy: float
    top5: float | None
    loss: float
    classes: list[str]
    per_class: list[float | None]
    confusion: list[list[int]]
    worst: list[Mistake]
    skipped: list[tuple[str, str]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, numbers and texts."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Prediction:
    """The classes of one image.

    Attributes:
        path: The image file.
        top: (class, probability) of the most probable classes, best first; empty when there is an error.
        error: Why the image could not be read, or None.
    """

    path: str
    top: list[tuple[str, float]]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, numbers and texts."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunResult:
    """What a training run ended with.

    Attributes:
        out: The run folder.
        data: Name of the data set.
        backbone: Name of the backbone.
        method: Method with its options.
        accuracy: Top-1 on the held-out part, 0 to 1.
        top5: Top-5 there; None with five classes or fewer.
        loss: Mean cross-entropy there, nats.
        part: The held-out part: ``test``, or ``val`` where the data has no test part.
        val_accuracy: Top-1 on the validation part, 0 to 1.
        classes: Class names.
        per_class: Accuracy of each class on the held-out part; None for a class without images.
        confusion: Row: true class, column: predicted class, in images of the held-out part.
        worst: Wrong predictions of the held-out part, the most confident first.
        trainable_params: Trained numbers, adapter and head.
        adapter_params: Of these, without the head.
        head_params: Of these, in the head.
        backbone_params: Numbers in the frozen backbone, without its own classifier.
        adapter_bytes: Size of the adapter folder.
        train_images: Number of training images.
        val_images: Number of validation images.
        test_images: Number of images in the held-out part.
        skipped: Unreadable images that were left out.
        epochs: Epochs that were trained.
        steps: Optimiser steps that were made.
        best_epoch: Epoch (from 1) whose weights are kept.
        seconds: Wall-clock time of training, summed over resumed parts.
        images_per_second: Training throughput, median over the epochs.
        peak_rss_mb: Largest resident memory of the whole process so far, MB (not only of this run).
        peak_cuda_mb: Largest memory on the CUDA device, MB; None elsewhere.
        stopped_early: Whether early stopping ended the run.
        history: One record per epoch, as in metrics.csv.
        lean: What the frozen layers were told to keep for the backward.
        frozen_dtype: Type of the frozen weights.
        saved_bytes: What autograd kept for the backward of the first batch, on one device, without parameters and
            images; None for a run that had no step left to make.
    """

    out: Path
    data: str
    backbone: str
    method: str
    accuracy: float
    top5: float | None
    loss: float
    part: str
    val_accuracy: float
    classes: list[str]
    per_class: list[float | None]
    confusion: list[list[int]]
    worst: list[Mistake]
    trainable_params: int
    adapter_params: int
    head_params: int
    backbone_params: int
    adapter_bytes: int
    train_images: int
    val_images: int
    test_images: int
    skipped: int
    epochs: int
    steps: int
    best_epoch: int
    seconds: float
    images_per_second: float
    peak_rss_mb: float
    peak_cuda_mb: float | None
    stopped_early: bool
    history: list[dict[str, Any]] = field(default_factory=list)
    lean: str = "off"
    frozen_dtype: str = "fp32"
    saved_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, numbers and texts."""
        return {**dataclasses.asdict(self), "out": str(self.out)}


def read_result(summary: Path) -> RunResult:
    """The result that ``summary.json`` of a run folder holds.

    Raises:
        GraftError: The file is missing, damaged or of another version.
    """
    try:
        values = json.loads(summary.read_text(encoding="utf-8"))
        values["worst"] = [Mistake(**mistake) for mistake in values["worst"]]
        return RunResult(**{**values, "out": summary.parent})
    except OSError as error:
        raise GraftError(f"{summary}: cannot be read ({error.strerror}); has the run finished?") from error
    except (ValueError, TypeError, KeyError) as error:
        raise GraftError(f"{summary}: not the summary of a torchgraft run ({error})") from error
