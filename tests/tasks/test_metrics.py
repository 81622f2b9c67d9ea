from __future__ import annotations

import math

import pytest
import torch

from torchgraft.tasks.metrics import Scores, report


def test_a_report_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    scores = report(logits, torch.tensor([0, 0, 1, 1]))
    assert scores.accuracy == 0.75
    assert scores.per_class == [0.5, 1.0, None]
    assert scores.confusion == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert scores.top5 is None
    normaliser = math.log(math.exp(2) + 2)
    assert scores.loss == pytest.approx((3 * (normaliser - 2) + normaliser) / 4)


def test_top5_counts_the_first_five_of_more_classes():
    logits = torch.arange(7.0).repeat(7, 1)
    scores = report(logits, torch.arange(7))
    assert scores.top5 == 5 / 7
    assert scores.accuracy == 1 / 7


def test_running_scores_over_uneven_batches_equal_the_report():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 9, generator=generator), torch.randint(0, 9, (50,), generator=generator)
    running = Scores(9)
    for part in (slice(0, 7), slice(7, 40), slice(40, 50)):
        running.update_with(logits[part], labels[part])
    whole = report(logits, labels)
    assert float(running["loss"].compute()) == pytest.approx(whole.loss)
    assert float(running["accuracy"].compute()) == pytest.approx(whole.accuracy)
    assert float(running["top5"].compute()) == pytest.approx(whole.top5)


def test_a_loss_that_is_no_number_is_not_hidden():
    running = Scores(3)
    running.update_with(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([1]))
    running.update_with(torch.full((1, 3), float("nan")), torch.tensor([1]))
    assert math.isnan(float(running["loss"].compute()))
