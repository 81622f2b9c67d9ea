"""Channels last is chosen by what a model is made of."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import torchgraft as tg
from torchgraft.core.memory_format import map_share
from torchgraft.core.probe import trace


@pytest.mark.parametrize(
    ("name", "prefers"),
    [
        ("test_resnet", True),
        ("test_efficientnet", True),
        ("test_vit", False),
        pytest.param("resnet18", True, marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_050", True, marks=pytest.mark.slow),
        pytest.param("regnetx_002", True, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", False, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", False, marks=pytest.mark.slow),
        pytest.param("mixer_s32_224", False, marks=pytest.mark.slow),
    ],
)
def test_networks_of_convolutions_prefer_it_and_networks_of_linear_layers_do_not(name: str, prefers: bool) -> None:
    model = timm.create_model(name)
    assert tg.prefers_channels_last(model) is prefers


def test_an_adapter_does_not_change_the_choice() -> None:
    model = timm.create_model("test_vit")
    tg.attach(model, "convpass")
    assert not tg.prefers_channels_last(model)


def test_a_model_that_accepts_no_guess_stays_as_it_is() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + y

    assert not tg.prefers_channels_last(TwoInputs())
    assert tg.prefers_channels_last(TwoInputs(), example=((torch.randn(1, 3, 8, 8), torch.zeros(1)), {}))


def test_the_share_is_that_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(576, 10)
    )
    found = map_share(model, trace(model, ((torch.randn(1, 3, 8, 8),), {})))
    maps = 36 * 8 * 27 + 36 * 8 * 4 * 4
    assert found == pytest.approx(maps / (maps + 5760))


def test_convolutions_of_signals_and_volumes_are_no_maps() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3))
    assert map_share(model, trace(model, ((torch.randn(1, 3, 4, 8, 8),), {}))) == 0
