"""Adapters on the levels of a pyramid, and texts that pixels read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchgraft.backbones import create_features
from torchgraft.errors import GraftError
from torchgraft.tasks.dense import (
    LanguageToVision,
    LevelAdapter,
    MultiScaleAdapter,
    alignment_loss,
    box_alignment_loss,
    pixel_cross_entropy,
    task_rows,
)
from torchgraft.tasks.dense.lv_adapter import default_bottleneck


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small() -> LanguageToVision:
    torch.manual_seed(0)
    return LanguageToVision(24, 32, attention_dim=16, heads=4)


@pytest.mark.parametrize("size", [(6, 7), (1, 1)])
def test_an_adapter_starts_as_the_identity(size: tuple[int, int]) -> None:
    x = torch.randn(2, 24, *size)
    assert torch.equal(LevelAdapter(24)(x), x)


def test_adapters_of_a_pyramid_leave_the_backbone_alone_and_train() -> None:
    provider = create_features("convnext_atto", pretrained=False, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    maps = provider.requires_grad_(False)(torch.randn(1, 3, 64, 96))
    adapter = MultiScaleAdapter(provider.channels)
    adapted = adapter(maps)
    for index, (before, after) in enumerate(zip(maps, adapted, strict=True)):
        assert torch.equal(before, after)
        assert torch.equal(adapter.after_stage(index, before), after)
    torch.stack([each.square().mean() for each in adapted]).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert all(level.up.weight.grad.any() for level in adapter.levels)


@pytest.mark.parametrize(("c", "r"), [(24, 8), (256, None)])
def test_parameters_of_an_adapter_follow_the_formula(c: int, r: int | None) -> None:
    width = r or default_bottleneck(c)
    assert count(LevelAdapter(c, r)) == 2 * c * width + 11 * width + 2 * c


def test_parameters_of_language_to_vision_follow_the_formula() -> None:
    c, d, e = 24, 32, 16
    assert count(small()) == 2 * c * e + 2 * d * e + 4 * c + 2 * d + c * d + d


def test_the_attention_of_every_pixel_sums_to_one_over_the_classes() -> None:
    found = small()(torch.randn(2, 24, 6, 7), torch.randn(2, 6, 32))
    assert torch.allclose(found.attention.sum(1), torch.ones(2, 6, 7))


def test_context_changes_the_map_by_a_ten_thousandth_at_the_start_and_not_at_all_without_gamma() -> None:
    module, x, text = small(), torch.randn(2, 24, 6, 7), torch.randn(6, 32)
    change = (module(x, text).output - x).abs().max()
    assert 0 < change < 1e-3
    nn.init.zeros_(module.gamma)
    assert torch.equal(module(x, text).output, x)


def test_one_set_of_texts_serves_every_image() -> None:
    module, x, text = small(), torch.randn(2, 24, 6, 7), torch.randn(6, 32)
    one, each = module(x, text), module(x, text.expand(2, -1, -1))
    assert torch.equal(one.output, each.output) and torch.equal(one.score, each.score)


def test_scores_are_cosines_over_the_temperature_and_do_not_see_the_length_of_a_text() -> None:
    module, x, text = small(), torch.randn(2, 24, 6, 7), torch.randn(6, 32)
    score = module(x, text).score
    assert score.abs().max() <= 1 / 0.07
    assert torch.allclose(module(x, 10 * text).score, score, atol=1e-4)


def test_every_parameter_learns_from_the_scores() -> None:
    module = small()
    module(torch.randn(2, 24, 6, 7), torch.randn(6, 32)).score.square().mean().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_task_is_aligned_by_its_own_rows_alone() -> None:
    det, sem, driv = task_rows([2, 4, 3])
    assert (det, sem, driv) == (slice(0, 2), slice(2, 6), slice(6, 9))
    score = torch.randn(2, 9, 4, 4, requires_grad=True)
    labels = torch.randint(4, (2, 16, 16))
    loss = alignment_loss(score, labels, sem)
    assert torch.equal(loss, pixel_cross_entropy(score[:, 2:6], labels))
    (gradient,) = torch.autograd.grad(loss, score)
    assert gradient[:, 2:6].all() and not gradient[:, :2].any() and not gradient[:, 6:].any()
    boxes, classes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.empty(0, 4)], [torch.tensor([1]), torch.empty(0)]
    (gradient,) = torch.autograd.grad(box_alignment_loss(score, boxes, classes, det), score)
    assert gradient[0, :2, :2, :2].all() and not gradient[:, 2:].any() and not gradient[1].any()


def test_images_without_labels_of_a_task_do_not_count() -> None:
    sem, score, labels = slice(0, 4), torch.randn(2, 9, 4, 4), torch.randint(4, (2, 16, 16))
    alone = alignment_loss(score[:1], labels[:1], sem)
    labels[1] = 255
    assert torch.allclose(alignment_loss(score, labels, sem), alone)
    labels[0] = 255
    assert alignment_loss(score, labels, sem) == 0
    assert box_alignment_loss(score, [torch.empty(0, 4)] * 2, [torch.empty(0)] * 2, slice(4, 6)) == 0


def test_modules_work_in_the_type_they_are_made_in() -> None:
    adapter = MultiScaleAdapter([24], dtype=torch.float64)
    module = LanguageToVision(24, 32, 16, 4, dtype=torch.float64)
    (adapted,) = adapter([torch.randn(1, 24, 2, 3, dtype=torch.float64)])
    assert module(adapted, torch.randn(6, 32, dtype=torch.float64)).score.dtype == torch.float64


def test_what_does_not_fit_is_named() -> None:
    module, adapter = small(), MultiScaleAdapter([24, 48])
    with pytest.raises(GraftError, match=r"expected a map \(B, 24, h, w\)"):
        module(torch.zeros(1, 8, 2, 2), torch.zeros(6, 32))
    with pytest.raises(GraftError, match=r"expected \(K, 32\)"):
        module(torch.zeros(1, 24, 2, 2), torch.zeros(6, 16))
    with pytest.raises(GraftError, match="one set per image"):
        module(torch.zeros(1, 24, 2, 2), torch.zeros(2, 6, 32))
    with pytest.raises(GraftError, match="1 maps for 2 levels"):
        adapter([torch.zeros(1, 24, 2, 2)])
    with pytest.raises(GraftError, match="stage 2: there are the levels 0 to 1"):
        adapter.after_stage(2, torch.zeros(1, 24, 2, 2))
    with pytest.raises(GraftError, match="heads=3 do not divide attention_dim=16"):
        LanguageToVision(24, 32, 16, 3)
    with pytest.raises(GraftError, match="tau=0"):
        LanguageToVision(24, 32, 16, 4, tau=0)
    with pytest.raises(GraftError, match="bottleneck=0"):
        LevelAdapter(24, 0)
    with pytest.raises(GraftError, match="at least one level"):
        MultiScaleAdapter([])
    with pytest.raises(GraftError, match="rows 3 to 5 of 4 classes"):
        alignment_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), slice(3, 5))


def test_every_tensor_is_made_on_the_device_of_the_input() -> None:
    (adapted,) = MultiScaleAdapter([24], device="meta")([torch.empty(1, 24, 2, 3, device="meta")])
    found = LanguageToVision(24, 32, 16, 4, device="meta")(adapted, torch.empty(6, 32, device="meta"))
    boxes, classes = [torch.empty(2, 4, device="meta")], [torch.empty(2, dtype=torch.long, device="meta")]
    assert found.output.is_meta and box_alignment_loss(found.score, boxes, classes, slice(0, 6)).is_meta
