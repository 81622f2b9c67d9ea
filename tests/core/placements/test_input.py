"""Input: acts on the image, in front of the first layer."""

from __future__ import annotations

import timm
import torch
from torch import nn

import torchgraft as tg
from torchgraft.core.placements import Input

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, run


def test_the_first_layer_sees_the_transformed_image() -> None:
    torch.manual_seed(0)
    model, x, form = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8), nn.Conv2d(3, 3, 1)
    remembered = Remembered(model, x)
    wanted = run(model, form(x).detach())
    adapter = attach(model, lambda _: Input(form, "0"), x)
    assert_close(run(model, x), wanted)
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


def test_it_acts_whichever_way_the_model_is_entered() -> None:
    torch.manual_seed(0)
    model, x, form = timm.create_model("test_resnet").eval(), torch.randn(1, 3, 32, 32), nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        wanted = model.forward_features(form(x))
        levels = model.forward_intermediates(form(x), intermediates_only=True)
    attach(model, lambda a: Input(form, a.stem))
    with torch.no_grad():
        assert_close(model.forward_features(x), wanted)
        for found, level in zip(model.forward_intermediates(x, intermediates_only=True), levels, strict=True):
            assert_close(found, level)


def test_rows_of_several_adapters_share_a_batch_unless_the_image_gets_another_size() -> None:
    assert Input(nn.Identity(), "0").splits
    assert not Input(nn.ZeroPad2d(1), "0", resizes=True).splits
