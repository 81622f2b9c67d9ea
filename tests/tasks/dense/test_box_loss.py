"""Boxes as targets of maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torchgraft.errors import GraftError
from torchgraft.tasks.dense import box_cross_entropy
from torchgraft.tasks.dense.box_loss import box_targets


def test_a_box_is_filled_in_the_channel_of_its_class() -> None:
    boxes = [torch.tensor([[4.0, 8.0, 13.0, 16.0]]), torch.empty(0, 4)]
    found = box_targets(boxes, [torch.tensor([1]), torch.empty(0)], 3, (6, 5))
    expected = torch.zeros(2, 3, 6, 5)
    expected[0, 1, 2:4, 1:3] = 1
    assert torch.equal(found.target, expected)
    assert torch.equal(found.inside, expected[:, 1:2])


def test_boxes_of_one_class_that_overlap_count_once() -> None:
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 12.0, 12.0]])
    assert box_targets([box], [torch.tensor([0, 0])], 2, (8, 8)).target.sum() == 4 + 4 - 1


def test_boxes_beyond_the_image_stay_inside_of_the_map() -> None:
    found = box_targets([torch.tensor([[-20.0, -4.0, 900.0, 900.0]])], [torch.tensor([0])], 1, (4, 4))
    assert found.target[0, 0, :3, :3].all()


def test_the_mean_is_over_the_cells_in_boxes_and_the_classes() -> None:
    logits = torch.randn(1, 2, 4, 4)
    loss = box_cross_entropy(logits, [torch.tensor([[0.0, 0.0, 8.0, 4.0]])], [torch.tensor([1])])
    cells, target = logits[0, :, 0, :2], torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert torch.allclose(loss, F.binary_cross_entropy_with_logits(cells, target))


def test_a_batch_without_boxes_gives_a_zero_loss_and_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = box_cross_entropy(logits, [torch.empty(0, 4)] * 2, [torch.empty(0)] * 2)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None and not logits.grad.any()


def test_boxes_without_a_class_are_named() -> None:
    with pytest.raises(GraftError, match=r"boxes \[2\] and classes \[1\]"):
        box_cross_entropy(torch.zeros(1, 2, 4, 4), [torch.zeros(2, 4)], [torch.zeros(1)])
    with pytest.raises(GraftError, match="boxes of 1 images for logits of 2"):
        box_cross_entropy(torch.zeros(2, 2, 4, 4), [torch.zeros(1, 4)], [torch.zeros(1)])
