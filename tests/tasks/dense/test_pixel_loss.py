"""Cross-entropy of maps against label maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torchgraft.errors import GraftError
from torchgraft.tasks.dense import pixel_cross_entropy


def test_the_mean_is_over_the_valid_pixels_alone() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    labels[0] = 255
    assert torch.allclose(pixel_cross_entropy(logits, labels), F.cross_entropy(logits[1:], labels[1:]))


def test_without_a_valid_pixel_the_loss_and_its_gradient_are_zero() -> None:
    logits = torch.randn(1, 3, 4, 5, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 8, 10), 255))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None and not logits.grad.any()


def test_half_precision_logits_and_byte_labels_give_a_float32_loss() -> None:
    logits, labels = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    loss = pixel_cross_entropy(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, pixel_cross_entropy(logits.bfloat16().float(), labels.long()))


@pytest.mark.parametrize(
    ("logits", "labels", "part"),
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.long), r"expected \(B, K, h, w\)"),
        (torch.zeros(2, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), r"expected \(B, K, h, w\)"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2), "expected integers"),
    ],
)
def test_labels_that_do_not_belong_to_the_logits_are_named(
    logits: torch.Tensor, labels: torch.Tensor, part: str
) -> None:
    with pytest.raises(GraftError, match=part):
        pixel_cross_entropy(logits, labels)
