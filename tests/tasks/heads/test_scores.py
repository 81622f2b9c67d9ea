"""The confusion matrix of segmentation and what follows from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchgraft.errors import GraftError
from torchgraft.tasks.heads import SegmentationScores

K, IGNORE = 4, 255


def batch(seed: int, classes: int = K) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    predictions = torch.randint(0, classes, (2, 6, 5), generator=random)
    labels = torch.randint(0, classes, (2, 6, 5), generator=random)
    labels[0, :2] = IGNORE
    return predictions, labels


def slow_confusion(batches: list[tuple[Tensor, Tensor]]) -> list[list[int]]:
    rows = [[0] * K for _ in range(K)]
    for predictions, labels in batches:
        for found, true in zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if true != IGNORE:
                rows[true][found] += 1
    return rows


def test_batches_add_up_to_the_counts_of_a_slow_loop() -> None:
    scores, batches = SegmentationScores(K), [batch(0), batch(1)]
    for predictions, labels in batches:
        scores.update(predictions, labels)
    rows, report = slow_confusion(batches), scores.compute()
    assert report.confusion.dtype == torch.int64
    assert report.confusion.tolist() == rows
    ious = [rows[k][k] / (sum(rows[k]) + sum(r[k] for r in rows) - rows[k][k]) for k in range(K)]
    accuracies = [rows[k][k] / sum(rows[k]) for k in range(K)]
    assert report.iou.tolist() == pytest.approx(ious)
    assert report.accuracy.tolist() == pytest.approx(accuracies)
    assert report.mean_iou.item() == pytest.approx(sum(ious) / K)
    assert report.mean_accuracy.item() == pytest.approx(sum(accuracies) / K)
    assert report.pixel_accuracy.item() == pytest.approx(sum(rows[k][k] for k in range(K)) / sum(map(sum, rows)))


def test_logits_count_as_their_largest_class() -> None:
    predictions, labels = batch(2)
    logits = torch.nn.functional.one_hot(predictions, K).permute(0, 3, 1, 2).float() * 3 - 1
    first, second = SegmentationScores(K), SegmentationScores(K)
    first.update(predictions, labels)
    second.update(logits, labels)
    assert torch.equal(first.confusion, second.confusion)


def test_a_class_that_never_occurs_is_nan_and_left_out_of_the_means() -> None:
    scores = SegmentationScores(K)
    labels = torch.tensor([[[0, 0, 1, 1]]])
    scores.update(torch.tensor([[[0, 1, 1, 2]]]), labels)
    report = scores.compute()
    assert report.iou[:3].tolist() == pytest.approx([1 / 2, 1 / 3, 0])  # class 2 was only predicted
    assert math.isnan(report.iou[3])
    assert report.mean_iou.item() == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert report.accuracy[:2].tolist() == [0.5, 0.5]
    assert report.accuracy[2:].isnan().all()
    assert report.mean_accuracy.item() == 0.5


def test_nothing_to_score_is_nan_without_a_failure() -> None:
    scores = SegmentationScores(K)
    scores.update(torch.zeros(1, 3, 3, dtype=torch.int64), torch.full((1, 3, 3), IGNORE))
    report = scores.compute()
    assert not report.confusion.any()
    assert all(math.isnan(v) for v in (report.mean_iou, report.mean_accuracy, report.pixel_accuracy))


def test_resetting_starts_again_and_another_ignore_index_counts() -> None:
    scores = SegmentationScores(K, ignore_index=0)
    scores.update(*(t % K for t in batch(0)))
    assert not scores.confusion[0].any() and scores.confusion.any()
    scores.reset()
    assert not scores.confusion.any()


def test_counts_stay_whole_numbers_above_what_float32_can_hold() -> None:
    scores = SegmentationScores(2).half()
    scores.confusion[0, 0] = 2**40
    scores.update(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64))
    assert scores.compute().confusion[0, 0].item() == 2**40 + 1


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), K), "labels hold the number 4"),
        (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), -1), "labels hold the number -1"),
        (torch.full((1, 2, 2), 9), torch.zeros(1, 2, 2).long(), "predictions hold the number 9"),
        (torch.zeros(1, K + 1, 2, 2), torch.zeros(1, 2, 2).long(), "expected logits"),
        (torch.zeros(1, K, 3, 2), torch.zeros(1, 2, 2).long(), "expected logits"),
        (torch.zeros(1, K, 2, 2), torch.zeros(1, 2, 2), "integers"),
    ],
)
def test_wrong_numbers_are_named_and_not_counted(predictions: Tensor, labels: Tensor, message: str) -> None:
    scores = SegmentationScores(K)
    with pytest.raises(GraftError, match=message):
        scores.update(predictions, labels)
    assert not scores.confusion.any()


def test_one_class_is_refused() -> None:
    with pytest.raises(GraftError, match="at least 2"):
        SegmentationScores(1)
