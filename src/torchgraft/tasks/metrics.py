"""Scores of a classifier: top-1, top-5, per class, confusion matrix and cross-entropy, by torchmetrics."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_confusion_matrix

TOP_K = 5


class Scores(nn.ModuleDict):
    """Running scores over batches; on several devices they add up to the scores of all images.

    The metrics are ``loss`` (mean cross-entropy, nats), ``accuracy`` (top-1) and, with more than five
    classes, ``top5``.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        # validate_args would read every batch back from the device, and so would the search for NaN, which
        # would also hide from us what it finds.
        accuracy = functools.partial(MulticlassAccuracy, num_classes, average="micro", validate_args=False)
        super().__init__({"loss": MeanMetric(nan_strategy="disable"), "accuracy": accuracy()})
        if num_classes > TOP_K:
            self["top5"] = accuracy(top_k=TOP_K)

    def metrics(self) -> Iterator[tuple[str, Metric]]:
        """The metrics by name."""
        return ((name, cast(Metric, module)) for name, module in self.items())

    def update_with(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (N, K), class numbers (N,)."""
        logits = logits.detach().float()
        for name, metric in self.metrics():
            if name == "loss":
                metric.update(F.cross_entropy(logits, labels, reduction="none"))
            else:
                metric.update(logits, labels)


@dataclass(frozen=True)
class Report:
    """Scores of one part of a data set.

    Attributes:
        loss: Mean cross-entropy in nats.
        accuracy: Share of images whose class came first, 0 to 1.
        top5: Share of images whose class was among the first five; None with five classes or fewer.
        per_class: Accuracy of each class; None for a class without images.
        confusion: Row: true class, column: predicted class, in images.
    """

    loss: float
    accuracy: float
    top5: float | None
    per_class: list[float | None]
    confusion: list[list[int]]


def report(logits: Tensor, labels: Tensor) -> Report:
    """All scores of a finished prediction.

    Args:
        logits: (N, K), N > 0.
        labels: (N,), class numbers.
    """
    n, num_classes = logits.shape
    confusion = multiclass_confusion_matrix(logits, labels, num_classes).to(torch.int64)
    totals, hits = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    among_first = (logits.topk(min(TOP_K, num_classes)).indices == labels[:, None]).any(1)
    return Report(
        loss=float(F.cross_entropy(logits.double(), labels)),
        accuracy=sum(hits) / n,
        top5=int(among_first.sum()) / n if num_classes > TOP_K else None,
        per_class=[hit / total if total else None for hit, total in zip(hits, totals, strict=True)],
        confusion=confusion.tolist(),
    )
