"""timm's ConvNeXt is the published one ("A ConvNet for the 2020s", arXiv:2201.03545): sizes, names, values."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.convnext import checkpoint_filter_fn

from torchgraft.backbones import create_backbone, create_features
from torchgraft.lean.meter import flops

DEPTHS, DIMS, CLASSES = (1, 2, 4, 2), (24, 32, 48, 64), 7
"""``test_convnext``."""


def image(height=75, width=102):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def official_state(head=True):
    """A randomised state dict under the published names."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"downsample_layers.0.0.weight": (DIMS[0], 3, 4, 4), "downsample_layers.0.0.bias": (DIMS[0],)}
    norms = {"downsample_layers.0.1": DIMS[0]}
    for i, (depth, dim) in enumerate(zip(DEPTHS, DIMS, strict=True)):
        if i:
            norms[f"downsample_layers.{i}.0"] = DIMS[i - 1]
            shapes[f"downsample_layers.{i}.1.weight"] = (dim, DIMS[i - 1], 2, 2)
            shapes[f"downsample_layers.{i}.1.bias"] = (dim,)
        for j in range(depth):
            block = f"stages.{i}.{j}"
            norms[f"{block}.norm"] = dim
            shapes |= {f"{block}.dwconv.weight": (dim, 1, 7, 7), f"{block}.dwconv.bias": (dim,)}
            shapes |= {f"{block}.pwconv1.weight": (4 * dim, dim), f"{block}.pwconv1.bias": (4 * dim,)}
            shapes |= {f"{block}.pwconv2.weight": (dim, 4 * dim), f"{block}.pwconv2.bias": (dim,)}
            shapes[f"{block}.gamma"] = (dim,)
    if head:
        norms["norm"] = DIMS[-1]
        shapes |= {"head.weight": (CLASSES, DIMS[-1]), "head.bias": (CLASSES,)}
    shapes |= {f"{name}.{part}": (dim,) for name, dim in norms.items() for part in ("weight", "bias")}
    return {
        key: torch.randn(shape, generator=generator) * (0.2 if len(shape) == 1 else shape[1:].numel() ** -0.5)
        for key, shape in ((k, torch.Size(s)) for k, s in shapes.items())
    }


def official_maps(state, x):
    """The four stages of the published network, each with the map that it returns."""

    def layer(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return normed * state[f"{name}.weight"].view(-1, 1, 1) + state[f"{name}.bias"].view(-1, 1, 1)

    maps = []
    for i, depth in enumerate(DEPTHS):
        if i == 0:
            x = norm(layer(x, "downsample_layers.0.0", stride=4), "downsample_layers.0.1")
        else:
            x = layer(norm(x, f"downsample_layers.{i}.0"), f"downsample_layers.{i}.1", stride=2)
        for j in range(depth):
            block = f"stages.{i}.{j}"
            y = norm(layer(x, f"{block}.dwconv", padding=3, groups=DIMS[i]), f"{block}.norm").permute(0, 2, 3, 1)
            y = F.linear(y, state[f"{block}.pwconv1.weight"], state[f"{block}.pwconv1.bias"])
            y = F.linear(F.gelu(y), state[f"{block}.pwconv2.weight"], state[f"{block}.pwconv2.bias"])
            x = x + (state[f"{block}.gamma"] * y).permute(0, 3, 1, 2)
        maps.append(x)
    return maps


def official_logits(state, x):
    pooled = F.layer_norm(
        official_maps(state, x)[-1].mean((2, 3)), DIMS[-1:], state["norm.weight"], state["norm.bias"], 1e-6
    )
    return F.linear(pooled, state["head.weight"], state["head.bias"])


def published(**options):
    """``test_convnext`` with the activation and the epsilon of the published models."""
    return {"act_layer": "gelu", "norm_eps": 1e-6, **options}


def loaded(state, classes=CLASSES, **options):
    overlay = {"state_dict": state, "num_classes": CLASSES}
    return timm.create_model(
        "test_convnext", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **published(**options)
    ).eval()


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


TABLE = {
    "downsample_layers.0.0.weight": "stem.0.weight",
    "downsample_layers.0.1.bias": "stem.1.bias",
    "downsample_layers.2.0.weight": "stages.2.downsample.0.weight",
    "downsample_layers.3.1.bias": "stages.3.downsample.1.bias",
    "stages.2.3.dwconv.weight": "stages.2.blocks.3.conv_dw.weight",
    "stages.0.0.norm.weight": "stages.0.blocks.0.norm.weight",
    "stages.1.1.pwconv1.weight": "stages.1.blocks.1.mlp.fc1.weight",
    "stages.1.1.pwconv2.bias": "stages.1.blocks.1.mlp.fc2.bias",
    "stages.3.0.gamma": "stages.3.blocks.0.gamma",
    "norm.weight": "head.norm.weight",
    "head.bias": "head.fc.bias",
}


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_published_name_has_its_place_in_timm(wrapped):
    state = official_state()
    model = timm.create_model("test_convnext", num_classes=CLASSES)
    converted = checkpoint_filter_fn({"model": state} if wrapped else state, model)
    assert converted.keys() == model.state_dict().keys()
    for theirs, ours in TABLE.items():
        assert torch.equal(converted[ours].flatten(), state[theirs].flatten())
    again = checkpoint_filter_fn(converted, model)
    assert all(again[k] is converted[k] for k in converted)


@pytest.mark.parametrize("conv_mlp", [False, True])
@torch.no_grad()
def test_timms_network_gives_the_values_of_the_published_one(conv_mlp):
    state = official_state()
    model = loaded(state, conv_mlp=conv_mlp)
    same(model(image()), official_logits(state, image()))
    maps = model.forward_intermediates(image(), intermediates_only=True)
    for found, wanted in zip(maps, official_maps(state, image()), strict=True):
        same(found, wanted)


@torch.no_grad()
def test_every_stride_rounds_down():
    maps = loaded(official_state(), features_only=True)(image(230, 211))
    assert [tuple(m.shape[2:]) for m in maps] == [(57, 52), (28, 26), (14, 13), (7, 6)]


@torch.no_grad()
def test_a_published_file_loads_without_its_head_and_with_other_channels():
    state = official_state()
    last = official_maps(state, image())[-1]
    same(loaded(state, classes=3).forward_features(image()), last)
    pooled = F.layer_norm(last.mean((2, 3)), DIMS[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
    same(loaded(state, classes=0)(image()), pooled)
    gray = loaded(state, in_chans=1)
    same(gray.stem[0].weight, state["downsample_layers.0.0.weight"].sum(1, keepdim=True))


@torch.no_grad()
def test_a_published_file_loads_by_path_into_the_classifier_and_the_pyramid(tmp_path):
    state = official_state()
    torch.save({"model": state}, tmp_path / "convnext.pth")
    model = create_backbone("test_convnext", weights=tmp_path / "convnext.pth", num_classes=CLASSES, **published())
    same(model(image()), official_logits(state, image()))
    pyramid = create_features("test_convnext", weights=tmp_path / "convnext.pth", out_norm=None, **published())
    for found, wanted in zip(pyramid(image()), official_maps(state, image()), strict=True):
        same(found, wanted)


@torch.no_grad()
def test_a_published_detector_loads_with_the_norm_of_every_map(tmp_path):
    state, generator = official_state(head=False), torch.Generator().manual_seed(2)
    norms = {
        f"norm{i}.{p}": torch.randn(d, generator=generator) for i, d in enumerate(DIMS) for p in ("weight", "bias")
    }
    dense = {f"backbone.{k}": v for k, v in (state | norms).items()}
    dense |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1)}
    torch.save({"state_dict": dense}, tmp_path / "detector.pth")
    pyramid = create_features("test_convnext", weights=tmp_path / "detector.pth", **published())
    for i, (found, raw) in enumerate(zip(pyramid(image()), official_maps(state, image()), strict=True)):
        last = F.layer_norm(
            raw.permute(0, 2, 3, 1), DIMS[i : i + 1], norms[f"norm{i}.weight"], norms[f"norm{i}.bias"], 1e-6
        )
        same(found, last.permute(0, 3, 1, 2))


SIZES = {
    "convnext_tiny": (28_589_128, 27_818_592, 4.456, 13.09, (96, 192, 384, 768)),
    "convnext_small": (50_223_688, 49_453_152, 8.684, 25.52, (96, 192, 384, 768)),
    "convnext_base": (88_591_464, 87_564_416, 15.355, 45.12, (128, 256, 512, 1024)),
    "convnext_large": (197_767_336, 196_227_264, 34.361, 100.98, (192, 384, 768, 1536)),
    "convnext_xlarge": (350_196_968, 348_143_872, 60.921, 179.03, (256, 512, 1024, 2048)),
}
"""Parameters with 1000 classes and of the maps alone, GMACs at 224 and 384 pixels, channels."""


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_the_published_parameters_and_channels(name):
    parameters, of_maps, _, _, channels = SIZES[name]
    whole = timm.create_model(name, num_classes=1000, device="meta")
    assert sum(p.numel() for p in whole.parameters()) == parameters
    pyramid = timm.create_model(name, features_only=True, device="meta")
    assert sum(p.numel() for p in pyramid.parameters()) == of_maps
    assert tuple(pyramid.feature_info.channels()) == channels
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if "tiny" in n else pytest.mark.slow) for n in SIZES])
@torch.no_grad()
def test_every_size_takes_the_published_multiply_adds(name):
    model = timm.create_model(name, num_classes=1000, device="meta").eval()
    for side, gmacs, digits in ((224, SIZES[name][2], 3), (384, SIZES[name][3], 2)):
        images = torch.empty(1, 3, side, side, device="meta")
        assert round(flops(lambda images=images: model(images)) / 2e9, digits) == gmacs
