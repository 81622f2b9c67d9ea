"""RevCol: the columns against an explicit computation, published checkpoints, supervision of the columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor

from torchgraft.backbones.published import Published
from torchgraft.backbones.revcol import PUBLISHED, RevCol, checkpoint_filter_fn, official_name
from torchgraft.backbones.revcol_supervision import Supervised, compound_loss
from torchgraft.errors import GraftError

from ..golden.compare import value_differences
from ..golden.files import read_case
from .architectures import make

CASES = Path(__file__).parents[1] / "golden" / "cases"
CASE_NAMES = ("revcol", "revcol_huge")


def small(**options) -> RevCol:
    """A network of two columns whose every branch and alpha shows."""
    torch.manual_seed(0)
    model = RevCol(**{"dims": (8, 12, 16, 20), "depths": (1, 1, 2, 1), "columns": 2, "num_classes": 5, **options})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.uniform_(0.3, 0.7)
            elif "alpha" in key:
                sign = torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0)
                parameter.uniform_(0.7, 0.99).mul_(sign)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(rows: int = 2, height: int = 64, width: int | None = None, chans: int = 3) -> Tensor:
    return torch.randn(rows, chans, height, width or height, generator=torch.Generator().manual_seed(1))


def case_model(case, **options) -> RevCol:
    """The network of a golden case, with random weights."""
    config = case.config
    sizes = {
        "dims": tuple(config["channels"]),
        "depths": tuple(config["layers"]),
        "columns": config["num_subnet"],
        "num_classes": config["num_classes"],
        "top_link": config["form"] == "revcol_huge",
        "zero_alpha": config["zero_alpha"],
    }
    return RevCol(**{**sizes, **options}).eval()


def assert_outputs(case, **found: Tensor) -> None:
    """By the rule of the golden cases."""
    assert not value_differences(found, {name: case.tensors["output"][name] for name in found}, case.tolerance)


# -- the equation ---------------------------------------------------------------------------------------------


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]


def stretched(x: Tensor, height: int, width: int) -> Tensor:
    """Every pixel of the larger map takes the pixel of the smaller one that covers its corner."""
    rows = torch.tensor([i * x.shape[-2] // height for i in range(height)])
    columns = torch.tensor([i * x.shape[-1] // width for i in range(width)])
    return x[..., rows, :][..., columns]


def slow(state: dict[str, Tensor], x: Tensor, columns: int) -> list[Tensor]:
    """The maps of the last column, from the formulas and a state dict."""

    def norm(x: Tensor, path: str) -> Tensor:
        return channel_norm(x, state[f"{path}.weight"], state[f"{path}.bias"])

    def linear(x: Tensor, path: str) -> Tensor:
        return torch.einsum("oi,bihw->bohw", state[f"{path}.weight"], x) + state[f"{path}.bias"][:, None, None]

    def block(x: Tensor, path: str) -> Tensor:
        weight = state[f"{path}.conv_dw.weight"]
        y = F.conv2d(x, weight, state[f"{path}.conv_dw.bias"], padding=weight.shape[-1] // 2, groups=weight.shape[0])
        y = linear(norm(y, f"{path}.norm"), f"{path}.mlp.fc1")
        y = linear(y * 0.5 * (1 + torch.erf(y / 2**0.5)), f"{path}.mlp.fc2")
        return x + state[f"{path}.gamma"][:, None, None] * y

    x = norm(F.conv2d(x, state["stem.0.weight"], state["stem.0.bias"], stride=4), "stem.1")
    before: list[Tensor] = []
    for i in range(columns):
        now: list[Tensor] = []
        for j in range(4):
            path = f"columns.{i}.levels.{j}"
            f = x
            if j:
                down = F.conv2d(
                    now[j - 1], state[f"{path}.downsample.0.weight"], state[f"{path}.downsample.0.bias"], stride=2
                )
                f = norm(down, f"{path}.downsample.1")
            size = f.shape[-2:]
            if i and j < 3:
                f = f + stretched(norm(linear(before[j + 1], f"{path}.up.proj"), f"{path}.up.norm"), *size)
            if f"{path}.up2.proj.weight" in state and i:
                f = f + stretched(norm(linear(before[3], f"{path}.up2.proj"), f"{path}.up2.norm"), *size)
            b = 0
            while f"{path}.blocks.{b}.gamma" in state:
                f, b = block(f, f"{path}.blocks.{b}"), b + 1
            now.append(state[f"{path}.alpha"] * before[j] + f if i else f)
        before = now
    return before


@pytest.mark.parametrize("top_link", [False, True])
@pytest.mark.parametrize("side", [(64, 96), (76, 101)])
def test_the_columns_compute_the_equation(top_link, side):
    model = small(columns=3, top_link=top_link, kernel_size=5).double().eval()
    x = images(2, *side).double()
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        wanted = slow(model.state_dict(), x, 3)
        pooled = wanted[3].mean((2, 3))
        head = F.layer_norm(pooled, pooled.shape[1:], model.head.norm.weight, model.head.norm.bias, 1e-6)
        for found, expected in zip(maps, wanted, strict=True):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(model(x), model.head.fc(head))


def test_stochastic_depth_grows_along_a_column_and_is_the_same_in_every_column():
    model = small(drop_path_rate=0.4)
    rates = [
        [getattr(block.drop_path, "drop_prob", 0.0) for level in levels for block in level.blocks]
        for levels in model.grid()
    ]
    assert rates[0] == rates[1] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


# -- alpha ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_alpha, at_zero", [("clamp", 1e-3), ("keep", 0.0)])
def test_an_alpha_acts_away_from_zero_and_its_gradient_passes(zero_alpha, at_zero):
    level = small(zero_alpha=zero_alpha).grid()[1][0]
    given = torch.tensor([0.5, -0.25, 1e-4, -1e-4, 0.0, -0.0, 1e-3, -7.0]).reshape(1, 8, 1, 1)
    with torch.no_grad():
        level.alpha.copy_(given)
    used = level.used_alpha()
    wanted = torch.tensor([0.5, -0.25, 1e-3, -1e-3, at_zero, at_zero, 1e-3, -7.0])
    assert torch.equal(used.flatten(), wanted)
    used.backward(torch.arange(8.0).reshape(1, 8, 1, 1))
    assert torch.equal(level.alpha.grad.flatten(), torch.arange(8.0))
    assert torch.equal(level.alpha.detach(), given), "the parameter itself stays as it is"


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_writes_to_no_parameter(training):
    model = small()
    with torch.no_grad():
        model.grid()[1][2].alpha.zero_()
    model.train(training).requires_grad_(False)
    before = {k: (v, v._version) for k, v in model.state_dict(keep_vars=True).items()}
    model(images())
    assert all(v._version == version for v, version in before.values())


def test_the_alphas_of_the_first_column_have_no_effect_and_a_gradient_of_zero():
    model = small().eval()
    out = model(images())
    with torch.no_grad():
        for level in model.grid()[0]:
            level.alpha.fill_(3.0)
    assert torch.equal(model(images()), out)
    out.sum().backward()
    assert all(torch.equal(level.alpha.grad, torch.zeros_like(level.alpha)) for level in model.grid()[0])
    assert all(level.alpha.grad.abs().max() > 0 for level in model.grid()[1])
    assert model.no_weight_decay() == {f"columns.0.levels.{j}.alpha" for j in range(4)}


# -- published checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("wrapped", ["no", "model", "module", "backbone"])
def test_a_published_checkpoint_loads(name, wrapped):
    case = read_case(CASES, name)
    state = {k: v.clone() for k, v in case.tensors["state"].items()}
    given = {
        "no": state,
        "model": {"model": state, "epoch": 3},
        "module": {"state_dict_ema": {f"module.{k}": v for k, v in state.items()}},
        "backbone": {"state_dict": {f"backbone.{k}": v for k, v in state.items()}},
    }[wrapped]
    model = case_model(case)
    model.load_state_dict(checkpoint_filter_fn(given, model))
    assert_outputs(case, logits=model(case.tensors["input"]["image"]))
    assert all(torch.equal(state[k], case.tensors["state"][k]) for k in state)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_a_published_checkpoint_loads_without_head_and_with_other_classes_and_channels(name):
    case = read_case(CASES, name)
    state = {k: v for k, v in case.tensors["state"].items() if not k.startswith("cls")}
    bare = case_model(case, num_classes=0)
    missing = bare.load_state_dict(checkpoint_filter_fn(state, bare), strict=False)
    assert all(key.startswith("head.norm") for key in missing.missing_keys) and not missing.unexpected_keys
    maps = bare.forward_intermediates(case.tensors["input"]["image"], intermediates_only=True)
    assert_outputs(case, **{f"c{i}": found for i, found in enumerate(maps)})

    overlay = {"state_dict": case.tensors["state"], "num_classes": case.config["num_classes"]}
    entry = {"revcol": "test_revcol", "revcol_huge": "test_revcol_huge"}[name]
    sizes = {"dims": tuple(case.config["channels"]), "depths": tuple(case.config["layers"])}
    other = timm.create_model(
        entry, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=11, in_chans=1, **sizes
    )
    torch.testing.assert_close(other.stem[0].weight, case.tensors["state"]["stem.0.weight"].sum(1, keepdim=True))
    assert other.eval()(images(1, 72, 104, chans=1)).shape == (1, 11)
    features = timm.create_model(
        entry, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, zero_alpha="keep", **sizes
    )
    maps = features.eval()(case.tensors["input"]["image"])
    assert_outputs(case, **{f"c{i}": found for i, found in enumerate(maps)})


def test_smaller_depthwise_kernels_get_a_frame_of_zeros():
    case = read_case(CASES, "revcol")
    wide, narrow = case_model(case, kernel_size=7), case_model(case)
    wide.load_state_dict(checkpoint_filter_fn(dict(case.tensors["state"]), wide))
    narrow.load_state_dict(checkpoint_filter_fn(dict(case.tensors["state"]), narrow))
    torch.testing.assert_close(wide(images()), narrow(images()))


def official_keys(columns: int, depths: tuple[int, ...], *, stepwise: bool) -> list[str]:
    """The keys of a supervised network in the published code."""
    layer = ("weight", "bias")
    block = ["gamma", *(f"{m}.{n}" for m in ("dwconv", "norm", "pwconv1", "pwconv2") for n in layer)]
    keys = [f"stem.{i}.{n}" for i in (0, 1) for n in layer]
    for i in range(columns):
        keys += [f"subnet{i}.alpha{j}" for j in range(4)]
        for j, depth in enumerate(depths):
            path = f"subnet{i}.level{j}"
            parts = ["down"] * (j > 0) + ["up.channel_reschedule"] * (i > 0 and j < 3)
            keys += [f"{path}.fusion.{part}.{m}.{n}" for part in parts for m in (0, 1) for n in layer]
            keys += [f"{path}.blocks.{b}.{k}" for b in range(depth) for k in block]
    keys += [f"cls_blocks.{i}.classifier.{m}.{n}" for i in range(4) for m in (0, 1) for n in layer]
    for i in range(3):
        path = f"decoder_blocks.{i}"
        steps = range(3) if stepwise else ()
        keys += [f"{path}.proj_layers.{j}.{m}.{n}" for j in steps for m in (0, 1) for n in layer]
        keys += [f"{path}.normal_layers.{j}.0.{k}" for j in steps for k in block]
        keys += [f"{path}.projback.{m}.{n}" for m in ((0,) if stepwise else (0, 1)) for n in layer]
    return keys


@pytest.mark.parametrize("classes", [5, 1001])
def test_every_official_key_of_a_supervised_network_has_its_place(classes):
    model = small(columns=4, inter_supv=True, num_classes=classes)
    keys = official_keys(4, (1, 1, 2, 1), stepwise=classes <= 1000)
    assert sorted(official_name(key) for key in keys) == sorted(model.state_dict())


def test_a_pretrained_network_is_fine_tuned_without_what_supervised_it():
    pretrained, tuned = small(columns=4, inter_supv=True), small(columns=4)
    tuned.load_state_dict(checkpoint_filter_fn(pretrained.state_dict(), tuned))
    assert torch.equal(tuned.eval()(images()), pretrained.eval()(images()))


# -- supervision of the columns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, few, many",
    [
        ("revcol_tiny", 33_063_984, 79_494_852),
        pytest.param("revcol_small", 63_176_240, 109_607_108, marks=pytest.mark.slow),
        pytest.param("revcol_base", 141_694_960, 193_772_980, marks=pytest.mark.slow),
        pytest.param("revcol_large", 280_372_272, 371_077_188, marks=pytest.mark.slow),
        pytest.param("revcol_xlarge", 851_958_576, 1_005_203_844, marks=pytest.mark.slow),
        pytest.param("revcol_huge", 2_199_107_704, 2_433_000_700, marks=pytest.mark.slow),
    ],
)
def test_the_supervised_networks_have_the_published_parameters(name, few, many):
    for classes, wanted in ((1000, few), (21841, many)):
        with torch.device("meta"):
            model = timm.create_model(name, inter_supv=True, num_classes=classes)
        assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize("columns", [4, 8])
@pytest.mark.parametrize("classes", [5, 1001])
def test_four_columns_are_classified_and_three_rebuild_the_image(columns, classes):
    model = small(columns=columns, inter_supv=True, num_classes=classes).eval()
    found = model.forward_supervised(images(2, 64, 96))
    assert [tuple(t.shape) for t in found.logits] == [(2, classes)] * 4
    assert [tuple(t.shape) for t in found.images] == [(2, 3, 64, 96)] * 3
    assert torch.equal(found.logits[-1], model(images(2, 64, 96)))


def test_every_parameter_of_a_supervised_network_gets_a_gradient():
    model = small(columns=4, inter_supv=True).train()
    found = model.forward_supervised(images())
    compound_loss(found, torch.rand(2, 3, 64, 64), torch.tensor([1, 3])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_leaves_out_what_supervises():
    model = small(columns=4, inter_supv=True).eval()
    called = []
    model.supervision.register_forward_hook(lambda *_: called.append(1))
    model(images())
    assert not called


def test_the_compound_loss_is_the_published_sum():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 5, generator=generator) for _ in range(4)]
    rebuilt = [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(3)]
    image, target = torch.rand(2, 3, 32, 32, generator=generator), torch.softmax(torch.randn(2, 5), 1)
    image[0] = 0.0
    before = image.clone()
    found = compound_loss(Supervised(logits, rebuilt), image, target, f_coe=2.0, c_coe=0.5)
    clamped = image.clamp(0.01, 0.99)
    wanted = []
    for j in range(3):
        p = torch.sigmoid(rebuilt[j])
        pixels = -(clamped * p.log() + (1 - clamped) * (1 - p).log()).mean()
        classes = -(target * logits[j].log_softmax(1)).sum(1).mean()
        wanted.append((1 - j / 3) * 2.0 * pixels + (j + 1) / 4 * 0.5 * classes)
    wanted.append(-(target * logits[3].log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(found.parts, torch.stack(wanted))
    torch.testing.assert_close(found.loss, sum(wanted))
    assert torch.equal(image, before), "the image is not written to"


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 6])
def test_columns_that_cannot_be_supervised_are_refused(columns):
    with pytest.raises(GraftError, match=f"multiple of 4 columns, not {columns}"):
        small(columns=columns, inter_supv=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"memory": "reversable"}, "memory='reversable'"),
        ({"zero_alpha": "drop"}, "zero_alpha='drop'"),
        ({"dims": (8, 16, 32)}, "4 dims"),
        ({"columns": 0}, "at least one column"),
        ({"columns": 4, "inter_supv": True, "num_classes": 0}, "needs classes"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, message):
    with pytest.raises(GraftError, match=message) as raised:
        small(**options)
    assert "\n" not in str(raised.value)


def test_supervision_that_is_not_there_or_does_not_fit_is_refused():
    with pytest.raises(GraftError, match="inter_supv=True"):
        small().forward_supervised(images())
    found = small(columns=4, inter_supv=True).forward_supervised(images(1, 72))
    with pytest.raises(GraftError, match="multiples of 32"):
        compound_loss(found, torch.rand(1, 3, 72, 72), torch.tensor([0]))


# -- the rest -------------------------------------------------------------------------------------------------


def test_lists_that_are_given_stay_as_they_are():
    dims, depths = [8, 12, 16, 20], [1, 1, 2, 1]
    first = RevCol(dims=dims, depths=depths, columns=4, inter_supv=True, num_classes=5)
    assert (dims, depths) == ([8, 12, 16, 20], [1, 1, 2, 1])
    assert first.feature_info[0]["num_chs"] == 8


def test_groups_follow_the_shortest_way_through_the_grid_of_blocks():
    model = small(columns=3, top_link=True)
    groups = group_parameters(model, model.group_matcher())
    depth_of = {name: depth for depth, names in groups.items() for name in names}
    ordered = sorted(set(depth_of.values()))
    firsts = [0, 1, 2, 4]  # number of a level's first block in its column
    for name, depth in depth_of.items():
        if found := re.match(r"columns\.(\d)\.levels\.(\d)\.(?:blocks\.(\d))?", name):
            i, j, b = int(found[1]), int(found[2]), int(found[3] or 0)
            wanted = i if name.endswith("alpha") else i + firsts[j] + b
            assert ordered.index(depth) == 1 + wanted, name  # the stem is 0
    assert {n for n, d in depth_of.items() if ordered.index(d) == 0} == {
        "stem.0.weight",
        "stem.0.bias",
        "stem.1.weight",
        "stem.1.bias",
    }


@pytest.mark.parametrize("taps", [(0,), (1, 2), (3,)])
@pytest.mark.parametrize("name", ["test_revcol", "test_revcol_huge"])
def test_some_of_the_maps_come_from_a_smaller_network(name, taps):
    whole = make(name)
    state = whole.state_dict()
    some = make(
        name, features_only=True, out_indices=taps, pretrained=True, pretrained_cfg_overlay={"state_dict": state}
    )
    some["model"].load_state_dict({k: v for k, v in state.items() if k in some["model"].state_dict()})
    maps = whole.forward_intermediates(images(), intermediates_only=True)
    for index, found in zip(taps, some(images()), strict=True):
        torch.testing.assert_close(found, maps[index])
    assert len(some["model"].grid()[-1]) == max(taps) + 1


@pytest.mark.slow
def test_the_wrapper_of_the_features_can_be_scripted():
    features = make("test_revcol", features_only=True)
    for a, b in zip(torch.jit.script(features)(images()), features(images()), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_is_the_memory_mode():
    model = small()
    assert model.memory == "recompute" and model.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert model.memory == "off" and not model.grad_checkpointing
    model.set_grad_checkpointing()
    assert model.memory == "recompute"
    model.set_memory_mode("reversible")
    model.set_grad_checkpointing()
    assert model.memory == "reversible"
    assert {level.memory for levels in model.grid() for level in levels} == {"reversible"}


def test_the_published_record_names_every_size():
    sizes = ("tiny", "small", "base", "large", "xlarge", "huge")
    assert list(PUBLISHED) == [f"revcol_{size}" for size in sizes]
    assert all(isinstance(p, Published) and p.top1 for p in PUBLISHED.values())
