from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from torchgraft.errors import GraftError
from torchgraft.tasks.denseclip import DenseClipDetectorBackbone, TextEncoder, create_trunk


@pytest.fixture
def build(
    text_encoder: TextEncoder, class_tokens: Tensor, decoder: dict[str, int]
) -> Callable[..., DenseClipDetectorBackbone]:
    def make(**options: Any) -> DenseClipDetectorBackbone:
        trunk = create_trunk("convnext_atto", 24, input_size=64, pretrained=False, pos_mode="crop_or_resize")
        return DenseClipDetectorBackbone(trunk, text_encoder, class_tokens, decoder=decoder, fpn_channels=64, **options)

    return make


def test_levels_halve_from_the_start_level_on(build: Callable[..., DenseClipDetectorBackbone]) -> None:
    levels, scores = build().detect(torch.randn(1, 3, 96, 128))
    assert [tuple(x.shape[2:]) for x in levels.values()] == [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    assert {x.shape[1] for x in levels.values()} == {64}
    assert scores.shape == (1, 4, 24, 32)
    levels, _ = build(start_level=0, extra_levels=0).detect(torch.randn(1, 3, 64, 64))
    assert [x.shape[-1] for x in levels.values()] == [16, 8, 4, 2]


def test_scores_that_are_not_read_leave_the_plain_pyramid(build: Callable[..., DenseClipDetectorBackbone]) -> None:
    model = build(extra_levels=0).eval()
    lateral = model.neck.inner_blocks[-1][0]  # type: ignore[index]
    with torch.no_grad():
        lateral.weight[:, 320:] = 0  # type: ignore[union-attr,operator,index]
    image = torch.randn(1, 3, 64, 64)
    with_scores = model(image)
    with torch.no_grad():
        model.contexts.neg_()
    assert all(torch.equal(a, b) for a, b in zip(with_scores.values(), model(image).values(), strict=True))


def test_pyramid_convolutions_start_without_biases(build: Callable[..., DenseClipDetectorBackbone]) -> None:
    biases = [p for name, p in build().neck.named_parameters() if name.endswith("bias")]
    assert len(biases) == 8 and not any(b.any() for b in biases)


def test_a_torchvision_detector_takes_a_step_on_it(build: Callable[..., DenseClipDetectorBackbone]) -> None:
    backbone = build(start_level=0, extra_levels=1).train()
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,), (64,), (128,)), aspect_ratios=((1.0,),) * 5)
    detector = FCOS(backbone, 5, anchor_generator=anchors, min_size=64, max_size=64)
    boxes, labels = [torch.tensor([[8.0, 8.0, 40.0, 48.0]])], [torch.tensor([2])]
    image = torch.randn(1, 3, 64, 64)
    losses = detector(list(image), [{"boxes": boxes[0], "labels": labels[0]}])
    losses["score"] = backbone.score_loss(backbone.detect(image)[1], boxes, labels)
    torch.stack(list(losses.values())).sum().backward()
    silent = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent


def test_a_pyramid_behind_the_scores_is_refused(build: Callable[..., DenseClipDetectorBackbone]) -> None:
    with pytest.raises(GraftError, match="start_level=4: the scores are on map 3"):
        build(start_level=4)
