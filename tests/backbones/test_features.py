"""Backbones as pyramids of maps: taps, norms on the outputs, official dense files, adapters on both sides."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers

import torchgraft as tg
from torchgraft.backbones import create_features
from torchgraft.backbones.taps import correct_taps
from torchgraft.errors import GraftError


def image(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv3_small_050"])
def test_maps_have_the_channels_and_strides_it_names(name):
    provider = create_features(name, pretrained=False, out_norm=None)
    maps = provider(image())
    assert provider.strides == (4, 8, 16, 32)
    assert [m.shape[1] for m in maps] == list(provider.channels)
    assert [64 // m.shape[-1] for m in maps] == list(provider.strides)


def test_the_maps_are_those_of_the_classifier():
    torch.manual_seed(0)
    provider = create_features("test_resnet", pretrained=False, strides=(16, 8))
    torch.manual_seed(0)
    whole = timm.create_model("test_resnet").eval()
    wanted = whole.forward_intermediates(image(), intermediates_only=True)
    for found in provider(image()):
        assert any(found.shape == w.shape and torch.equal(found, w) for w in wanted)
    assert provider.strides == (8, 16)


def test_convnext_gets_a_norm_on_every_map_and_a_resnet_none():
    provider = create_features("test_convnext", pretrained=False)
    assert sum(p.numel() for p in provider.norms.parameters()) == 2 * sum(provider.channels)
    for found in provider(image()):
        assert found.mean(1).abs().max() < 1e-4
        assert (found.var(1, unbiased=False) - 1).abs().max() < 1e-2
    assert not list(create_features("test_resnet", pretrained=False).norms.parameters())
    assert list(create_features("test_resnet", pretrained=False, out_norm="layernorm2d").norms.parameters())


def test_the_norm_is_outside_the_trunk():
    torch.manual_seed(0)
    plain = create_features("test_convnext", pretrained=False, out_norm=None)
    torch.manual_seed(0)
    normed = create_features("test_convnext", pretrained=False)
    for raw, norm, found in zip(plain(image()), normed.norms, normed(image()), strict=True):
        assert torch.equal(norm(raw), found)


def dense_file(tmp_path, name: str, official):
    """A published dense checkpoint: the trunk under ``backbone.``, a norm per output, no head, and a neck."""
    torch.manual_seed(3)
    whole = timm.create_model(name)
    state = {official(k): v for k, v in whole.state_dict().items() if not k.startswith("head.")}
    widths = [tap["num_chs"] for tap in whole.feature_info]
    for i, width in enumerate(widths):
        state |= {f"norm{i}.weight": torch.rand(width), f"norm{i}.bias": torch.rand(width)}
    file = tmp_path / "dense.pth"
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()}}, file)
    return file, whole.eval(), state


def official_convnext(key: str) -> str:
    """timm's name of a ConvNeXt tensor in the official code."""
    key = key.replace("stem.", "downsample_layers.0.")
    for i in (1, 2, 3):
        key = key.replace(f"stages.{i}.downsample.", f"downsample_layers.{i}.")
    return (
        key.replace(".blocks.", ".")
        .replace("conv_dw", "dwconv")
        .replace("mlp.fc1", "pwconv1")
        .replace("mlp.fc2", "pwconv2")
    )


@pytest.mark.parametrize("strides", [None, (8, 32)])
def test_a_published_dense_file_loads_with_its_output_norms(tmp_path, strides):
    file, whole, state = dense_file(tmp_path, "test_convnext", official_convnext)
    provider = create_features("test_convnext", weights=file, strides=strides)
    raw = dict(zip((4, 8, 16, 32), whole.forward_intermediates(image(), intermediates_only=True), strict=True))
    for stride, norm, found in zip(provider.strides, provider.norms, provider(image()), strict=True):
        level = {4: 0, 8: 1, 16: 2, 32: 3}[stride]
        assert torch.equal(norm.weight, state[f"norm{level}.weight"])
        torch.testing.assert_close(found, norm(raw[stride]))
    plain = create_features("test_convnext", weights=file, strides=strides, out_norm=None)
    torch.testing.assert_close(plain(image())[0], raw[plain.strides[0]])


def test_a_classifiers_file_loads_without_its_head(tmp_path):
    whole = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    provider = create_features("test_resnet", weights=tmp_path / "w.pth", strides=(8,))
    wanted = whole.forward_intermediates(image(), intermediates_only=True)
    assert any(w.shape == provider(image())[0].shape and w.equal(provider(image())[0]) for w in wanted)


def test_a_file_that_does_not_fit_is_an_error_that_names_the_keys(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(GraftError, match=r"w\.pth does not fit the feature maps of ConvNeXt: .*missing"):
        create_features("test_convnext", weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"strides": (5,)}, r"strides=\[5\]: test_resnet has maps of the strides"),
        ({"out_norm": "batch"}, "out_norm='batch': expected"),
        ({"taps": "first"}, "taps='first': expected"),
    ],
)
def test_options_that_cannot_be_are_errors(options, words):
    with pytest.raises(GraftError, match=words):
        create_features("test_resnet", pretrained=False, **options)


@pytest.mark.parametrize("name", ["test_convnext", "ghostnet_050"])
def test_an_adapter_of_a_classifier_loads_into_the_pyramid_and_back(tmp_path, name):
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    adapter = tg.attach(whole, "conv-adapter[reduction=4]", num_classes=3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save(tmp_path / "adapter")
    provider = create_features(name, weights=tmp_path / "w.pth", out_norm=None)
    before = provider(image())
    # The last layers of GhostNet stand behind its last map.
    loaded = tg.load(provider, tmp_path / "adapter", strict=name != "ghostnet_050")
    found = provider(image())
    assert all(not a.equal(b) for a, b in zip(before, found, strict=True))
    loaded.save(tmp_path / "again")
    fresh = timm.create_model(name)
    fresh.load_state_dict(torch.load(tmp_path / "w.pth"))
    tg.load(fresh.eval(), tmp_path / "again")
    wanted = correct_taps(fresh).forward_intermediates(image(), intermediates_only=True)[-4:]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name, strides, channels",
    [
        ("torchvision:resnet18", (4, 8, 16, 32), (64, 128, 256, 512)),
        ("torchvision:swin_t", (4, 8, 16, 32), (96, 192, 384, 768)),
        ("torchvision:mobilenet_v3_small", (4, 8, 16, 32), (16, 24, 48, 96)),
    ],
)
def test_a_network_that_hands_out_no_maps_is_tapped_at_its_blocks(name, strides, channels):
    provider = create_features(name, pretrained=False)
    assert (provider.strides, provider.channels) == (strides, channels)
    x = torch.randn(1, 3, 64, 96)
    for found, stride, width in zip(provider(x), strides, channels, strict=True):
        assert found.shape == (1, width, 64 // stride, 96 // stride)


def test_the_maps_of_a_transformers_model_are_its_hidden_states(tmp_path):
    small = {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    torch.manual_seed(0)
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**small)).eval()
    model.save_pretrained(tmp_path)
    provider = create_features(f"hf:{tmp_path}")
    assert (provider.strides, provider.channels) == ((4, 8), (8, 16))
    x = torch.randn(1, 3, 64, 96)
    last = model.swin(x, output_hidden_states=True).reshaped_hidden_states[-1]
    torch.testing.assert_close(provider(x)[1], last)


def test_an_adapter_attaches_to_a_tapped_network():
    torch.manual_seed(0)
    provider = create_features("torchvision:resnet18", pretrained=False)
    before = provider(image())
    adapter = tg.attach(provider, "conv-adapter[reduction=4]")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    found = provider(image())
    assert all(not a.equal(b) for a, b in zip(before, found, strict=True))
    sum(m.square().mean() for m in found).backward()
    assert all(p.grad is not None for p in adapter.parameters())
