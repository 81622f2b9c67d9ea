"""Whole, sliding and augmented inference against slow loops."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.errors import GraftError
from torchgraft.tasks.heads import augmented_inference, sliding_inference, whole_inference


@pytest.fixture
def network() -> nn.Module:
    """Depends on the whole window, so that windows of other places or sizes give other logits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 5, 3, padding=1))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 23, 17, generator=torch.Generator().manual_seed(1))


def up(logits: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def slow_sliding(network: nn.Module, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """For every pixel: the mean over the windows that hold it."""
    height, width = images.shape[-2:]
    tops, lefts = (starts(*args) for args in zip((height, width), crop, stride, strict=True))
    windows = {}
    for top in tops:
        for left in lefts:
            part = images[:, :, top : top + crop[0], left : left + crop[1]]
            windows[top, left] = up(network(part), *part.shape[-2:])
    result = torch.empty(len(images), 5, height, width)
    for y in range(height):
        for x in range(width):
            seen = [
                logits[:, :, y - top, x - left]
                for (top, left), logits in windows.items()
                if 0 <= y - top < logits.shape[2] and 0 <= x - left < logits.shape[3]
            ]
            result[:, :, y, x] = torch.stack(seen).mean(0)
    return result


def starts(side: int, crop: int, stride: int) -> list[int]:
    found = [0]
    while found[-1] + crop < side:
        found.append(min(found[-1] + stride, side - crop))
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("crop", "stride"), [((8, 8), (5, 5)), ((8, 6), (3, 6)), ((23, 17), (5, 5)), ((9, 40), (9, 2)), ((7, 7), (1, 7))]
)
def test_sliding_equals_the_mean_over_the_windows_of_every_pixel(
    network: nn.Module, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> None:
    found = sliding_inference(network, images, crop, stride)
    torch.testing.assert_close(found, slow_sliding(network, images, crop, stride))


def test_windows_all_have_the_size_of_the_crop(images: Tensor) -> None:
    seen = []
    sliding_inference(lambda x: seen.append(tuple(x.shape[-2:])) or x, images, 8, 5)  # type: ignore[func-returns-value]
    assert set(seen) == {(8, 8)} and len(seen) == 4 * 3


def test_an_image_smaller_than_the_crop_is_segmented_at_once(network: nn.Module, images: Tensor) -> None:
    found = sliding_inference(network, images, 64, 32)
    torch.testing.assert_close(found, whole_inference(network, images))
    assert found.shape == (2, 5, 23, 17)


def test_whole_inference_resizes_the_logits_to_the_image(network: nn.Module, images: Tensor) -> None:
    found = whole_inference(network, images)
    torch.testing.assert_close(found, up(network(images), 23, 17).detach())
    assert not found.requires_grad


def test_half_precision_logits_are_averaged_in_float32(images: Tensor) -> None:
    for function in (whole_inference, functools.partial(sliding_inference, crop=8, stride=3)):
        assert function(lambda x: x.bfloat16(), images).dtype == torch.float32


@torch.no_grad()
def test_augmented_equals_the_mean_over_a_slow_loop(network: nn.Module, images: Tensor) -> None:
    scales = (0.5, 1.0, 1.3)
    predict = functools.partial(sliding_inference, network, crop=9, stride=6)
    expected = torch.zeros(2, 5, 23, 17)
    for scale in scales:
        size = (round(23 * scale), round(17 * scale))
        scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        expected += up(predict(scaled if scale != 1 else images), 23, 17).softmax(1) / 6
        mirrored = predict((scaled if scale != 1 else images).flip(3))
        expected += up(mirrored, 23, 17).softmax(1).flip(3) / 6
    found = augmented_inference(predict, images, scales=scales, flip=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 23, 17))


def test_with_flips_a_mirrored_image_gives_the_mirrored_result(network: nn.Module, images: Tensor) -> None:
    found = augmented_inference(network, images, flip=True)
    torch.testing.assert_close(augmented_inference(network, images.flip(3), flip=True), found.flip(3))
    assert not torch.allclose(
        augmented_inference(network, images.flip(3)), augmented_inference(network, images).flip(3)
    )


def test_without_augmentation_it_is_the_softmax_of_the_logits(network: nn.Module, images: Tensor) -> None:
    torch.testing.assert_close(augmented_inference(network, images), whole_inference(network, images).softmax(1))


@pytest.mark.parametrize(
    ("crop", "stride", "message"),
    [(8, 9, "above crop"), (0, 1, "crop=0"), (8, 0, "stride=0"), ((8, 4), 5, "above crop")],
)
def test_windows_that_leave_points_out_are_refused(
    images: Tensor, crop: int | tuple[int, int], stride: int, message: str
) -> None:
    with pytest.raises(GraftError, match=message):
        sliding_inference(lambda x: x, images, crop, stride)


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_scales_that_are_no_factors_are_refused(images: Tensor, scales: tuple[float, ...]) -> None:
    with pytest.raises(GraftError, match="above 0"):
        augmented_inference(lambda x: x, images, scales=scales)
