"""Pad prompts: a frame around the image, in front of whatever reads it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.methods.pad_prompt import PadFrame

from .networks import SIDE, TINY, images, tiny


def test_the_frame_covers_the_border_and_nothing_else() -> None:
    frame = PadFrame(2, 3, 7, 9)
    x = torch.zeros(1, 3, 7, 9)
    added = frame(x).detach()
    assert not added[:, :, 2:5, 2:7].any()
    border = torch.ones(7, 9, dtype=torch.bool)
    border[2:5, 2:7] = False
    assert added[0, :, border].all()
    assert sum(p.numel() for p in frame.parameters()) == 3 * int(border.sum())


def test_the_sides_are_where_their_names_say() -> None:
    frame = PadFrame(1, 1, 4, 4)
    with torch.no_grad():
        for value, side in enumerate((frame.up, frame.down, frame.left, frame.right), start=1):
            side.fill_(value)
        picture = frame(torch.zeros(1, 1, 4, 4))[0, 0]
    assert picture.tolist() == [[1, 1, 1, 1], [3, 0, 0, 4], [3, 0, 0, 4], [2, 2, 2, 2]]


@pytest.mark.parametrize("backbone", TINY)
def test_every_backbone_computes_what_it_does_for_the_framed_image(backbone: str) -> None:
    model = tiny(backbone)
    adapter = tg.attach(model, tg.PadPrompt(prompt_size=4))
    framed = adapter.placements[0][1].form(images())
    prompted = model(images())
    tg.activate(model, None)
    assert torch.equal(prompted, model(framed))
    assert not torch.equal(prompted, model(images()))


def test_features_see_the_frame_too() -> None:
    model = tiny("test_convnext")
    before = model.forward_features(images())
    tg.attach(model, tg.PadPrompt(prompt_size=4))
    assert not torch.equal(model.forward_features(images()), before)


def test_the_size_comes_from_the_model_or_from_the_option() -> None:
    form = tg.attach(tiny("test_resnet"), tg.PadPrompt(prompt_size=4)).placements[0][1].form
    assert (form.height, form.width) == (SIDE, SIDE)
    model = tiny("test_resnet")
    form = tg.attach(model, tg.PadPrompt(prompt_size=4, image_size=48)).placements[0][1].form
    assert (form.height, form.width) == (48, 48)
    assert model(images(side=48)).shape == (2, 3)


def test_a_layer_that_rearranges_pixels_before_the_stem_gets_the_framed_image() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fold = nn.PixelUnshuffle(2)
            self.conv = nn.Conv2d(12, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.fold(x))

    adapter = tg.attach(Net(), tg.PadPrompt(prompt_size=4), example=((images(),), {}))
    assert [s.path for s in adapter.sites] == ["fold"]
    assert adapter.num_parameters() == 12 * 4 * (SIDE - 4)


def test_an_image_of_another_size_is_an_error_that_names_both() -> None:
    model = tiny("test_resnet")
    tg.attach(model, tg.PadPrompt(prompt_size=4))
    with pytest.raises(tg.GraftError, match=r"made for images of 32 x 32 pixels and got 48 x 48; resize.*image_size="):
        model(images(side=48))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_size": 0}, r"prompt_size=0.*at least 1"),
        ({"image_size": 0}, r"image_size=0.*side in pixels"),
        ({"prompt_size": 16}, r"prompt_size=16 leaves nothing of an image of 32 x 32 pixels; use at most 15"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(tg.GraftError, match=message):
        tg.attach(tiny("test_resnet"), tg.PadPrompt(**options))


def test_a_model_that_reads_no_image_is_refused() -> None:
    with pytest.raises(tg.GraftError, match=r"pad-prompt: no layer of Linear was seen to read an image"):
        tg.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))[0], tg.PadPrompt())
