"""G-GhostNet: the equation of a ghost stage, the sizes, the published names, training, adapters."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

import torchgraft as tg
from torchgraft.backbones import create_backbone, create_features
from torchgraft.backbones.facts import counted_facts
from torchgraft.backbones.ghost_regnet import PUBLISHED, GGhostRegNet, GhostStage, official_name
from torchgraft.errors import GraftError

from ..golden.files import read_case
from .architectures import make

NAME = "test_ghost_regnet"


def image(rows=2, height=64, width=None):
    return torch.randn(rows, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def randomised(model):
    """Statistics and affines of the norms under which nothing cancels."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (norm.bias, norm.running_mean):
                tensor.normal_(0, 0.2, generator=generator)
    return model.eval()


def normalised(x, norm):
    """BatchNorm by its definition."""
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    row = (1, -1, 1, 1)
    scale = norm.weight / (variance + norm.eps).sqrt()
    return (x - mean.view(row)) * scale.view(row) + norm.bias.view(row)


def pointwise(x, conv):
    return torch.einsum("bchw,oc->bohw", x[:, :, :: conv.stride[0], :: conv.stride[1]], conv.weight[:, :, 0, 0])


def grouped(x, conv):
    """A 3x3 convolution, one output position and one group at a time."""
    (b, c, h, w), stride, groups = x.shape, conv.stride[0], conv.groups
    padded = torch.zeros(b, c, h + 2, w + 2)
    padded[:, :, 1:-1, 1:-1] = x
    weight = conv.weight.view(groups, -1, c // groups, 3, 3)
    out = torch.zeros(b, conv.out_channels, -(-h // stride), -(-w // stride))
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            window = padded[:, :, i * stride : i * stride + 3, j * stride : j * stride + 3]
            parts = window.reshape(b, groups, c // groups, 3, 3)
            out[:, :, i, j] = torch.einsum("bgcyx,gocyx->bgo", parts, weight).flatten(1)
    return out


def bottleneck(x, block):
    y = normalised(pointwise(x, block.conv1), block.bn1).relu()
    y = normalised(grouped(y, block.conv2), block.bn2).relu()
    y = normalised(pointwise(y, block.conv3), block.bn3)
    if not isinstance(block.downsample, nn.Identity):
        x = normalised(pointwise(x, block.downsample[0]), block.downsample[1])
    return (x + y).relu()


def ghost_stage(x, stage):
    """The equation, with all maps of the stage joined before the mean is taken."""
    full = bottleneck(x, stage.base)
    maps = [full[:, : stage.raw]]
    for block in stage.layers:
        maps.append(bottleneck(maps[-1], block))
    mean = torch.cat([full, *maps[1:]], 1).mean((2, 3), keepdim=True)
    mix = normalised(pointwise(mean, stage.merge[1]), stage.merge[2]).relu()
    mix = normalised(pointwise(mix, stage.merge[4]), stage.merge[5])
    cheap = (normalised(pointwise(full[:, stage.raw :], stage.cheap[0]), stage.cheap[1]) + mix).relu()
    return bottleneck(torch.cat([maps[-1], cheap], 1), stage.end)


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_a_ghost_stage_equals_its_equation_at_odd_sizes(training):
    torch.manual_seed(0)
    stage = randomised(GhostStage(10, 32, group_width=8, cheap_ratio=0.5, drop_paths=[0.0] * 4)).train(training)
    x = torch.randn(3, 10, 7, 10)
    wanted = ghost_stage(x, stage)
    assert wanted.shape == (3, 32, 4, 5)
    torch.testing.assert_close(stage(x), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_network_is_the_stem_the_four_stages_and_the_classifier():
    model = randomised(make(NAME))
    x = normalised(nn.functional.conv2d(image(), model.conv1.weight, stride=2, padding=1), model.bn1).relu()
    for block in (*model.layer1, *model.layer2):
        x = bottleneck(x, block)
    x = bottleneck(ghost_stage(x, model.layer3), model.layer4[0])
    torch.testing.assert_close(model(image()), x.mean((2, 3)) @ model.fc.weight.T + model.fc.bias, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_forward_in_training_moves_the_running_statistics_by_a_tenth():
    model = randomised(make(NAME))
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms.items()}
    inputs = {}
    for n, m in norms.items():
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.update({n: args[0]}))
    model.train()(image(3))
    assert "layer3.merge.5" in norms and inputs.keys() == norms.keys()
    for n, m in norms.items():
        x = inputs[n].transpose(0, 1).flatten(1)
        torch.testing.assert_close(m.running_mean, 0.9 * before[n][0] + 0.1 * x.mean(1))
        torch.testing.assert_close(m.running_var, 0.9 * before[n][1] + 0.1 * x.var(1, unbiased=True))
        assert m.num_batches_tracked == 1


@torch.no_grad()
def test_the_mix_reads_means_and_no_joined_map():
    model, seen = make(NAME), []
    model.layer3.merge.register_forward_hook(lambda module, args, out: seen.append((args[0].shape, out.shape)))
    model(image(2, 96))
    assert seen == [((2, 32 + 2 * 12, 1, 1), (2, 20, 1, 1))]


SPLITS = {
    "g_ghost_regnetx_002": {3: (72, 80, 296), 4: (180, 188, 1268)},
    "g_ghost_regnetx_004": {3: (72, 88, 520), 4: (192, 192, 2304)},
    "g_ghost_regnetx_006": {2: (36, 60, 132), 3: (108, 132, 564), 4: (252, 276, 1788)},
    "g_ghost_regnetx_008": {2: (60, 68, 188), 3: (144, 144, 1008), 4: (336, 336, 1680)},
    "g_ghost_regnetx_016": {2: (72, 96, 312), 3: (198, 210, 1992)},
    "g_ghost_regnetx_032": {2: (72, 120, 480), 3: (216, 216, 3240)},
    "g_ghost_regnetx_040": {2: (120, 120, 600), 3: (270, 290, 3800)},
    "g_ghost_regnetx_064": {2: (168, 224, 728), 3: (378, 406, 3808)},
    "g_ghost_regnetx_080": {2: (90, 150, 510), 3: (360, 360, 5400)},
    "g_ghost_regnetx_120": {2: (168, 280, 952), 3: (420, 476, 4676)},
    "g_ghost_regnetx_160": {2: (192, 320, 1280), 3: (384, 512, 5120)},
    "g_ghost_regnetx_320": {2: (252, 420, 1932), 3: (630, 714, 8274)},
}
"""Ghost stages of the published sizes: raw and cheap channels, and inputs of the mix."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_splits_its_channels_as_published(name):
    model = timm.create_model(name, device="meta")
    stages = {i: model.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)}
    found = {
        i: (s.raw, s.cheap[0].out_channels, s.merge[1].in_channels)
        for i, s in stages.items()
        if isinstance(s, GhostStage)
    }
    assert found == SPLITS[name]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.endswith(("_002", "_032")) else pytest.mark.slow) for n in PUBLISHED]
)
def test_every_published_size_takes_the_multiply_adds_published(name):
    assert counted_facts(name).gmacs == PUBLISHED[name].gmacs


@pytest.mark.parametrize(
    "depths, ghosts", [((3, 2, 2, 2), {3}), ((1, 3, 2, 1), {2, 3}), ((4, 2, 5, 3), {3, 4}), ((1, 3, 3, 3), {2, 3, 4})]
)
def test_the_third_stage_is_always_a_ghost_stage_the_first_never_the_others_from_depth_three(depths, ghosts):
    model = timm.create_model(NAME, depths=depths, device="meta")
    assert {i for i in (1, 2, 3, 4) if isinstance(model.get_submodule(f"layer{i}"), GhostStage)} == ghosts
    blocks = [m for m in model.modules() if type(m).__name__ == "Bottleneck"]
    assert len(blocks) == sum(depths)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"depths": (1, 1, 1, 1)}, "a depth of at least 2"),
        ({"group_width": 1}, "0 raw and 32 cheap channels"),
        ({"cheap_ratio": 0.9}, "0 raw and 32 cheap channels"),
        ({"cheap_ratio": 0.0, "group_width": 16, "widths": (16, 24, 48, 40)}, "48 raw and 0 cheap channels"),
        ({"depths": (1, 2, 4)}, "must be four each"),
    ],
)
def test_a_network_that_cannot_be_is_refused_in_one_line(options, words):
    with pytest.raises(GraftError, match=words) as caught:
        timm.create_model(NAME, device="meta", **options)
    assert "\n" not in str(caught.value)


def test_stochastic_depth_grows_from_base_through_the_layers_to_end():
    model = timm.create_model(NAME, drop_path_rate=0.7, device="meta")
    blocks = [m for m in model.modules() if type(m).__name__ == "Bottleneck"]
    assert [blocks.index(m) for m in (model.layer3.base, *model.layer3.layers, model.layer3.end)] == [3, 4, 5, 6]
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_the_mix_is_decayed_between_the_inner_blocks_and_the_end():
    model = timm.create_model(NAME, device="meta")
    groups = group_parameters(model, model.group_matcher())
    ids = {name: number for number, names in groups.items() for name in names}
    order = ["conv1", "layer1.0.conv1", "layer2.1.conv1", "layer3.base.conv1", "layer3.layers.0.conv1"]
    order += ["layer3.layers.1.conv1", "layer3.merge.1", "layer3.end.conv1", "layer4.0.conv1", "fc"]
    numbers = [ids[f"{name}.weight"] for name in order]
    assert numbers == sorted(set(numbers))
    assert ids["layer3.merge.1.weight"] == ids["layer3.cheap.0.weight"]


def test_training_with_one_image_is_refused_and_with_frozen_norms_it_works():
    model = make(NAME).train()
    with pytest.raises(GraftError, match="a batch of one image cannot train") as caught:
        model(image(1))
    assert "eval mode, or use SyncBatchNorm" in str(caught.value)
    assert "\n" not in str(caught.value)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    model(image(1)).mean().backward()


@pytest.fixture(scope="module")
def official():
    return read_case(Path(__file__).parents[1] / "golden" / "cases", "g_ghost_regnet")


@pytest.fixture
def size(official):
    keys = ("depths", "widths", "group_width", "stem_width")
    return {key: official.config[key] for key in keys} | {"drop_rate": 0.0}


def load(state, size, **options):
    overlay = {"state_dict": state, "num_classes": 11}
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**size, **options}).eval()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@torch.no_grad()
def test_a_published_checkpoint_loads_as_it_is(official, size, wrapper, prefix):
    state = {prefix + k: v for k, v in official.tensors["state"].items()}
    kept = dict(state)
    model = load({wrapper: state} if wrapper else state, size, num_classes=11)
    torch.testing.assert_close(model(official.tensors["input"]["image"]), official.tensors["output"]["logits"])
    assert state.keys() == kept.keys() and all(state[k] is kept[k] for k in kept)
    assert all(official_name(k) in model.state_dict() for k in official.tensors["state"])


@torch.no_grad()
def test_a_published_checkpoint_loads_without_its_head_and_with_other_channels(official, size):
    state, x = official.tensors["state"], official.tensors["input"]["image"]
    features = official.tensors["output"]["stage3"]
    torch.testing.assert_close(load(state, size, num_classes=0)(x), features.mean((2, 3)))
    torch.testing.assert_close(load(state, size, num_classes=3).forward_features(x), features)
    gray = load(state, size, num_classes=11, in_chans=1)
    torch.testing.assert_close(gray.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    headless = {k: v for k, v in state.items() if not k.startswith("fc.")}
    torch.testing.assert_close(load(headless, size, num_classes=0)(x), features.mean((2, 3)))
    for found, i in zip(load(state, size, features_only=True, out_indices=(1, 2, 3, 4))(x), range(4), strict=True):
        torch.testing.assert_close(found, official.tensors["output"][f"stage{i}"])


def test_a_published_file_loads_by_path(tmp_path, official, size):
    torch.save({"state_dict": {f"module.{k}": v for k, v in official.tensors["state"].items()}}, tmp_path / "w.pth")
    model = create_backbone(NAME, weights=tmp_path / "w.pth", num_classes=11, **size)
    torch.testing.assert_close(model(official.tensors["input"]["image"]), official.tensors["output"]["logits"])


def test_the_blocks_of_a_ghost_stage_are_found_in_the_order_of_the_forward_pass():
    model, ran = make(NAME), []
    found = tg.anatomy(model)
    for site in found.find("spatial_conv"):
        model.get_submodule(site.path).register_forward_hook(lambda module, args, out, p=site.path: ran.append(p))
    model(image())
    assert ran == [site.path for site in found.find("spatial_conv")]
    stage = ["layer3.base", "layer3.layers.0", "layer3.layers.1", "layer3.end"]
    assert ran == [f"{b}.conv2" for b in ("layer1.0", "layer2.0", "layer2.1", *stage, "layer4.0")]
    chosen = [s.path for s in tg.anatomy(model, include="stages[2:]").find("spatial_conv")]
    assert chosen == [f"{b}.conv2" for b in (*stage, "layer4.0")]


def test_an_adapter_trains_with_one_image_and_leaves_the_norms_alone():
    model = randomised(make(NAME, num_classes=5))
    statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    adapter = tg.attach(model, "conv-adapter[reduction=4]", include="stages[2:]", num_classes=3)
    model.train()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(image(1)), torch.tensor([1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    now = {k.replace(".original.", "."): v for k, v in model.state_dict().items()}
    assert all(now[k].equal(v) for k, v in statistics.items())


def test_an_adapter_of_the_classifier_loads_into_the_feature_maps_and_back(tmp_path):
    whole = randomised(make(NAME))
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    adapter = tg.attach(whole, "conv-adapter[reduction=4]", num_classes=3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save(tmp_path / "adapter")
    wanted = whole.forward_intermediates(image(), indices=[1, 2, 3, 4], intermediates_only=True)
    provider = create_features(NAME, weights=tmp_path / "w.pth")
    plain = provider(image())
    tg.load(provider, tmp_path / "adapter").save(tmp_path / "again")
    assert provider.strides == (4, 8, 16, 32)
    for a, b, c in zip(provider(image()), wanted, plain, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.equal(c)
    fresh = make(NAME)
    fresh.load_state_dict(torch.load(tmp_path / "w.pth"))
    tg.load(fresh, tmp_path / "again")
    for a, b in zip(fresh.forward_intermediates(image(), indices=4, intermediates_only=True), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_dilation_is_refused():
    with pytest.raises(AssertionError, match="output_stride must be 32"):
        GGhostRegNet(output_stride=16, device="meta")
