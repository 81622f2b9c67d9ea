"""Prompts on the image: a frame that enlarges it, and channels behind its own."""

from __future__ import annotations

import pytest
import timm
import timm.models as tm
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.methods.forms.image import EnlargingFrame, PromptChannels

from .networks import TINY, count, images, tiny

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("backbone", ["resnet50", "convnext_tiny"])
def test_a_frame_has_the_published_number_of_values(backbone: str) -> None:
    assert count(backbone, "vpt-pad") == count(backbone, "vpt-pad[prompt_size=5]") == 12 * 5 * 229 == 13_740
    assert count(backbone, "vpt-pad[prompt_size=30]") == 91_440


def test_channels_are_counted_with_the_stem_that_reads_them() -> None:
    assert count("resnet50", "vpt-below") == 5 * 224 * 224 + 64 * 8 * 49 + 128 == 276_096
    patches = 768 * 8 * 16 * 16 + 768
    assert count("vit_base_patch16_224", "vpt-below") == 5 * 224 * 224 + patches


@pytest.mark.parametrize("start", ["random", "gaussian"])
def test_a_frame_stands_around_an_image_that_need_not_be_square(start: str) -> None:
    frame, x = EnlargingFrame(2, 3, 5, 7, start=start, name="vpt-pad"), torch.randn(2, 3, 5, 7)
    with torch.no_grad():
        framed = frame(x)
        ends, sides = frame.top_bottom, frame.left_right
        if start == "random":
            assert 0 <= ends.min() < ends.max() <= 1
            ends, sides = (ends - MEAN) / STD, (sides - MEAN) / STD
    assert framed.shape == (2, 3, 9, 11)
    torch.testing.assert_close(framed[:, :, 2:7, 2:9], x)
    torch.testing.assert_close(framed[:, :, :2], ends[:, :, :2].expand(2, -1, -1, -1))
    torch.testing.assert_close(framed[:, :, 7:], ends[:, :, 2:].expand(2, -1, -1, -1))
    torch.testing.assert_close(framed[:, :, 2:7, :2], sides[..., :2].expand(2, -1, -1, -1))
    torch.testing.assert_close(framed[:, :, 2:7, 9:], sides[..., 2:].expand(2, -1, -1, -1))
    assert sum(p.numel() for p in frame.parameters()) == framed[0].numel() - x[0].numel()


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_a_convnet_computes_what_it_does_for_the_enlarged_image(backbone: str) -> None:
    model = tiny(backbone)
    adapter = tg.attach(model, "vpt-pad[prompt_size=3]")
    framed = adapter.placements[0][1].form(images())
    prompted = _run(model, images())
    tg.activate(model, None)
    assert framed.shape[-2:] == (38, 38)
    assert torch.equal(prompted, _run(model, framed.detach()))


@pytest.mark.parametrize("make", [tm.VisionTransformer, tm.SwinTransformer])
def test_a_transformer_takes_a_frame_where_it_takes_images_of_any_size(make) -> None:
    small = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "num_classes": 5}
    more = {"depth": 2, "num_heads": 2} if make is tm.VisionTransformer else {"depths": (1, 1), "num_heads": (1, 2)}
    example = ((images(1),), {})
    fixed, dynamic = make(**small, **more).eval(), make(**small, **more, dynamic_img_size=True).eval()
    with pytest.raises(tg.GraftError, match=r"takes no image of 40 x 40 pixels.*dynamic_img_size=True.*pad-prompt"):
        tg.attach(fixed, "vpt-pad[prompt_size=4]", example=example)
    adapter = tg.attach(dynamic, "vpt-pad[prompt_size=4]", example=example)
    prompted, framed = _run(dynamic, images()), adapter.placements[0][1].form(images()).detach()
    tg.activate(dynamic, None)
    torch.testing.assert_close(prompted, _run(dynamic, framed))


@pytest.mark.parametrize("backbone", TINY)
def test_the_stem_reads_the_channels_and_the_rest_of_the_backbone_stays(backbone: str) -> None:
    model = tiny(backbone)
    plain = _run(model, images())
    adapter = tg.attach(model, "vpt-below[num_channels=2]")
    channels = adapter.placements[0][1]
    stem = model.get_submodule(channels.home)
    assert stem.weight.shape[1] == 5
    kernel = model.state_dict()[f"{channels.home}.weight"]
    assert torch.equal(stem.weight[:, :3], kernel)
    assert not torch.allclose(_run(model, images()), plain, atol=1e-4)
    with torch.no_grad():  # without the new channels the stem is the pretrained one
        stem.weight[:, 3:] = 0
    torch.testing.assert_close(_run(model, images()), plain, rtol=1e-4, atol=1e-5)


def test_the_batchnorm_behind_the_stem_trains_too() -> None:
    kinds = {}
    for backbone in ("test_resnet", "test_convnext"):
        adapter = tg.attach(tiny(backbone), "vpt-below")
        kinds[backbone] = [s.kind for s in adapter.sites]
        assert all(name.endswith(("prompt", "weight", "bias")) for name, _ in adapter.named_parameters())
    assert kinds == {"test_resnet": ["conv2d", "batchnorm"], "test_convnext": ["conv2d"]}


@pytest.mark.parametrize(("start", "number"), [("random", "random"), ("gaussian", "gaussian"), ("uniform", 0.25)])
def test_channels_start_as_published(start: str, number: str | float) -> None:
    form, x = PromptChannels(50, 4, 6, start=number, name="vpt-below"), torch.randn(2, 3, 4, 6)
    with torch.no_grad():
        out = form(x)
    assert out.shape == (2, 53, 4, 6)
    assert torch.equal(out[:, :3], x)
    raw = form.prompt.detach()
    if start == "random":
        assert 0 <= raw.min() < raw.max() <= 1
        torch.testing.assert_close(out[:, 3:], ((raw - MEAN.mean()) / STD.mean()).expand(2, -1, -1, -1))
    else:
        assert torch.equal(out[:, 3:], raw.expand(2, -1, -1, -1))
        assert (0.2 < raw.abs().max() <= 0.25) == (start == "uniform")


@pytest.mark.parametrize("method", ["vpt-pad", "vpt-below"])
def test_an_image_of_another_size_is_an_error_that_names_both(method: str) -> None:
    model = tiny("test_resnet")
    tg.attach(model, method)
    with pytest.raises(
        tg.GraftError, match=rf"{method}: the prompt was made for images of 32 x 32 pixels and got 48 x 48"
    ):
        model(images(side=48))
    tg.detach(model)
    tg.attach(model, f"{method}[image_size=48]")
    assert model(images(side=48)).shape == (2, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vpt-pad[prompt_size=0]", r"vpt-pad: prompt_size=0.*at least 1"),
        ("vpt-pad[image_size=0]", r"vpt-pad: image_size=0.*a side in pixels"),
        ("vpt-below[num_channels=0]", r"vpt-below: num_channels=0.*at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, message: str) -> None:
    with pytest.raises(tg.GraftError, match=message):
        tg.attach(tiny("test_resnet"), spec)


def test_a_model_that_rearranges_pixels_first_has_no_stem_for_channels() -> None:
    model = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3))
    with pytest.raises(tg.GraftError, match=r"vpt-below: '0' \(PixelUnshuffle\), which reads the image, is no plain"):
        tg.attach(model, "vpt-below", example=((images(),), {}))


@pytest.mark.parametrize("method", ["vpt-pad[prompt_size=3]", "vpt-below[num_channels=2]"])
def test_a_prompted_image_passes_compilation_and_export(method: str) -> None:
    model, x = timm.create_model("test_resnet", num_classes=3).eval(), images(2, 64)
    tg.attach(model, method, example=((x[:1],), {}))
    wanted = _run(model, x)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted, rtol=1e-4, atol=1e-5)
