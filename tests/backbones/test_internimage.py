"""InternImage beyond what every backbone is tested for: its equations, its norm schemes, published checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.backbones.internimage import PUBLISHED, InternImage, checkpoint_filter_fn
from torchgraft.backbones.internimage_block import DCNv3, InternImageBlock
from torchgraft.backbones.internimage_head import ClipFusion, ClipHead
from torchgraft.errors import GraftError

from ..golden.files import CaseFiles, read_case
from .architectures import make

CASES = Path(__file__).parents[1] / "golden" / "cases"
SMALL = {"channels": 8, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8)}
"""The network of the golden case, whose norms stand behind the branches."""
OFFICIAL = {**SMALL, "layer_scale": 1e-5, "post_norm": True, "offset_scale": 2.0}
TINY = {**SMALL, "depths": (1, 1, 1, 1)}
"""That of the case in the manner of the smallest size, whose norms stand in front."""


@pytest.fixture(scope="module")
def case() -> CaseFiles:
    return read_case(CASES, "internimage")


@pytest.fixture(scope="module")
def tiny_case() -> CaseFiles:
    return read_case(CASES, "internimage_t")


def image(rows: int = 1, side: int = 64) -> Tensor:
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(0))


def randomised(module: nn.Module, std: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


# -- the equations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove_center", [False, True])
def test_a_pixel_is_the_weighted_sum_of_bilinear_samples_around_it(remove_center):
    dcn = DCNv3(4, groups=2, offset_scale=1.5, center_feature_scale=True, remove_center=remove_center)
    dcn = randomised(dcn.double(), 0.5)
    u = torch.randn(1, 4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(dcn(u), by_hand(dcn, u), rtol=1e-9, atol=1e-9)


def by_hand(dcn: DCNv3, u: Tensor) -> Tensor:
    """One pixel, group, point and channel at a time."""
    _, height, width, dim = u.shape
    z = F.gelu(F.layer_norm(dcn.dw_conv[0](u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), (dim,), *affine(dcn), 1e-6))[0]
    v, offset, logits = dcn.input_proj(u)[0], dcn.offset(z), dcn.mask(z)
    own = torch.sigmoid(z @ dcn.center_feature_scale_proj.weight.T + dcn.center_feature_scale_proj.bias)
    grid = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    if dcn.remove_center:
        grid.remove((0, 0))
    points, wide = len(grid), dim // dcn.groups
    y = torch.zeros_like(v)
    for row in range(height):
        for column in range(width):
            for group in range(dcn.groups):
                weights = logits[row, column, group * points : (group + 1) * points].softmax(0)
                part = slice(group * wide, (group + 1) * wide)
                for t, (gx, gy) in enumerate(grid):
                    dx, dy = offset[row, column, 2 * (group * points + t) :][:2].tolist()
                    at = row + dcn.offset_scale * (gy + dy), column + dcn.offset_scale * (gx + dx)
                    y[row, column, part] += weights[t] * sample(v[..., part], *at)
                s = own[row, column, group]
                y[row, column, part] = (1 - s) * y[row, column, part] + s * v[row, column, part]
    return dcn.output_proj(y)[None]


def affine(dcn: DCNv3) -> tuple[Tensor, Tensor]:
    return dcn.dw_conv[1].weight, dcn.dw_conv[1].bias


def sample(v: Tensor, y: float, x: float) -> Tensor:
    value = torch.zeros_like(v[0, 0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < v.shape[0] and 0 <= column < v.shape[1]:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * v[row, column]
    return value


def test_it_starts_as_the_mean_of_the_grid():
    model = InternImage(**SMALL)
    dcn = model.stages[1].blocks[0].dcn
    u = torch.randn(1, 6, 5, 16)
    mean = F.avg_pool2d(dcn.input_proj(u).permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(dcn(u), dcn.output_proj(mean))


SCHEMES = {
    "in front": ({}, lambda b, x, f, n, r, g: x + f(n(x))),
    "in front, scaled": ({"layer_scale": 0.5}, lambda b, x, f, n, r, g: x + g * f(n(x))),
    "behind": ({"post_norm": True}, lambda b, x, f, n, r, g: x + n(f(x))),
    "behind, scaled": ({"post_norm": True, "layer_scale": 0.5}, lambda b, x, f, n, r, g: x + g * n(f(x))),
    "on both sides": ({"res_post_norm": True}, lambda b, x, f, n, r, g: x + r(f(n(x)))),
    "behind although asked for on both": (
        {"post_norm": True, "res_post_norm": True},
        lambda b, x, f, n, r, g: x + n(f(x)),
    ),
    "in front, scaled, although asked for on both": (
        {"layer_scale": 0.5, "res_post_norm": True},
        lambda b, x, f, n, r, g: x + g * f(n(x)),
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_norms_and_layer_scale_stand_where_the_published_code_has_them(scheme):
    options, branch = SCHEMES[scheme]
    block = randomised(InternImageBlock(8, groups=2, **options))
    x = torch.randn(2, 5, 4, 8)
    gamma = [getattr(ls, "gamma", None) for ls in (block.ls1, block.ls2)]
    wanted = branch(block, x, block.dcn, block.norm1, block.res_post_norm1, gamma[0])
    wanted = branch(block, wanted, block.mlp, block.norm2, block.res_post_norm2, gamma[1])
    torch.testing.assert_close(block(x), wanted)


def test_the_stream_goes_through_a_norm_behind_the_named_blocks():
    model = randomised(InternImage(**{**SMALL, "depths": (1, 1, 3, 1)}, level2_post_norm_block_ids=(0, 2)))
    stage = model.stages[2]
    x = torch.randn(1, 16, 8, 8)
    wanted = stage.downsample(x).permute(0, 2, 3, 1)
    wanted = stage.post_norms[0](stage.blocks[0](wanted))
    wanted = stage.post_norms[1](stage.blocks[2](stage.blocks[1](wanted)))
    torch.testing.assert_close(stage(x), stage.norm(wanted).permute(0, 3, 1, 2))
    assert [len(s.post_norms) for s in model.stages] == [0, 0, 2, 0]


@pytest.mark.parametrize(
    "options, normed",
    [({}, True), ({"post_norm": True}, False), ({"post_norm": True, "center_feature_scale": True}, True)],
)
def test_maps_are_normed_unless_the_blocks_already_end_in_norms(options, normed):
    model = InternImage(**SMALL, **options)
    assert all(isinstance(stage.norm, nn.LayerNorm) == normed for stage in model.stages)


@pytest.mark.parametrize("side", [4, 5])
def test_the_last_two_maps_are_joined_pixel_over_pixel(side):
    fusion = ClipFusion(6, 8, 4)
    fine, deep = torch.randn(1, 6, side, side), torch.randn(1, 8, -(-side // 2), -(-side // 2))
    joined, coarse, beside = fusion(fine, deep), fusion.deep(deep), fusion.fine(fine)
    for row in range(side):
        for column in range(side):
            place = 2 * (row % 2) + column % 2
            above = coarse[0, place::4, row // 2, column // 2]
            torch.testing.assert_close(joined[0, :, row, column], above + beside[0, :, row, column])


def test_the_head_of_the_large_sizes_takes_other_pools_too():
    model = make("test_internimage_clip", num_classes=3)
    assert isinstance(model.head, ClipHead)
    features = model.forward_features(image())
    model.reset_classifier(4, "max")
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(4, "attn")
    assert model(image()).shape == (1, 4)
    with pytest.raises(AssertionError, match="clip projector"):
        make("test_internimage").reset_classifier(4, "attn")


# -- published checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, entries", zip(PUBLISHED, (633, 751, 751, 839, 883, 1357, 1295), strict=True))
def test_every_size_has_as_many_tensors_as_the_published_one(name, entries):
    with torch.device("meta"):
        assert len(timm.create_model(name).state_dict()) == entries


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


FILES = {
    "as published": lambda s: s,
    "in a training checkpoint": lambda s: {"model": s, "epoch": 3},
    "of DeepSpeed": lambda s: {"module": wrapped(s, "module.")},
    "beside its teacher": lambda s: {
        **wrapped(s, "teacher."),
        **wrapped(s, "student."),
        "student_proj.weight": torch.zeros(1),
    },
    "of transformers": lambda s: {
        "model." + k.replace("gamma1", "layer_scale1").replace("gamma2", "layer_scale2"): v for k, v in s.items()
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_a_published_file_gives_the_published_outputs(case, kind):
    model = InternImage(num_classes=7, **OFFICIAL).eval()
    file = FILES[kind](dict(case.tensors["state"]))
    keys = list(file)
    model.load_state_dict(checkpoint_filter_fn(file, model), strict=True)
    assert list(file) == keys
    with torch.no_grad():
        found = model(case.tensors["input"]["image"])
    torch.testing.assert_close(found, case.tensors["output"]["logits"], rtol=1e-4, atol=1e-5)


def test_names_of_the_large_head_are_understood_in_both_of_their_forms():
    model = make("test_internimage_clip", num_classes=3)
    ours = model.state_dict()
    joint = {
        "mask_token": torch.zeros(1),
        "dcnv3.patch_embed.conv1.weight": ours["stem.conv1.weight"],
        "mm_dcnv3.patch_embed.conv1.weight": torch.zeros(1),
        "dcnv3.dcnv3_head_x4.0.weight": ours["fusion.deep.weight"],
        "dcnv3_head_x3.bias": ours["fusion.fine.bias"],
        "clip_projector.norm1_q.0.weight": ours["head.global_pool.norm_q.weight"],
        "clip_projector.cross_dcn.k_bias": ours["head.global_pool.k.bias"],
        "clip_projector.cross_dcn.proj.weight": ours["head.global_pool.proj.weight"],
        "clip.classifier_ln.weight": ours["head.norm.weight"],
        "clip.classifier.bias": ours["head.fc.bias"],
        "clip.text.weight": torch.zeros(1),
    }
    plain = {
        "patch_embed.conv1.weight": ours["stem.conv1.weight"],
        "dcnv3_head_x3.weight": ours["fusion.fine.weight"],
        "fc_norm.0.bias": ours["head.norm.bias"],
        "head.weight": ours["head.fc.weight"],
    }
    for file, count in ((joint, 8), (plain, 4)):
        converted = checkpoint_filter_fn(file, model)
        assert len(converted) == count
        assert all(torch.equal(value, ours[key]) for key, value in converted.items())


def load(state: dict[str, Tensor], classes: int, **options) -> InternImage:
    """The network of the golden case through timm, which has a file of ``classes`` classes at hand."""
    overlay = {"state_dict": dict(state), "num_classes": classes}
    arguments = {"mlp_ratio": 4.0, "pretrained": True, "pretrained_cfg_overlay": overlay, **options}
    return timm.create_model("test_internimage", **arguments).eval()


def test_other_numbers_of_classes_and_channels_load_through_timm(case):
    state, x = case.tensors["state"], case.tensors["input"]["image"]
    model = load(state, 7, num_classes=5, in_chans=1)
    first = state["patch_embed.conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.stem.conv1.weight.detach(), first)
    assert model(x[:, :1]).shape == (1, 5)
    headless = {k: v for k, v in state.items() if not k.startswith("head.")}
    for file in (state, headless):
        found = load(file, 7, num_classes=0).forward_features(x)
        torch.testing.assert_close(found, case.tensors["output"]["feat3"], rtol=1e-4, atol=1e-5)


def test_an_image_of_another_size_and_shape_runs_on_loaded_weights(case):
    model = load(case.tensors["state"], 7, num_classes=7)
    maps = model.forward_intermediates(torch.randn(1, 3, 65, 97), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(17, 25), (9, 13), (5, 7), (3, 4)]


def test_a_detector_gives_its_backbone_and_leaves_the_head_alone(case):
    state = {k: v for k, v in case.tensors["state"].items() if k.startswith(("patch_embed", "levels"))}
    file = {"state_dict": {**wrapped(state, "backbone."), "neck.conv.weight": torch.zeros(1)}}
    model = InternImage(num_classes=7, **OFFICIAL).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(checkpoint_filter_fn(file, model), strict=True)
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith(("conv_head.", "head.")))
    maps = model.forward_intermediates(case.tensors["input"]["image"], intermediates_only=True)
    for i, found in enumerate(maps):
        torch.testing.assert_close(found, case.tensors["output"][f"feat{i}"], rtol=1e-4, atol=1e-5)


def test_a_file_without_layer_scale_loads_into_a_model_with_it(tiny_case):
    model = InternImage(num_classes=7, layer_scale=1e-5, **TINY).eval()
    model.load_state_dict(checkpoint_filter_fn(dict(tiny_case.tensors["state"]), model), strict=True)
    found = model(tiny_case.tensors["input"]["image"])
    torch.testing.assert_close(found, tiny_case.tensors["output"]["logits"], rtol=1e-4, atol=1e-5)


def test_layer_scale_of_a_file_goes_into_the_layers_of_a_model_without_it(tiny_case):
    scaled = InternImage(num_classes=7, layer_scale=1.0, **TINY).eval()
    file = dict(tiny_case.tensors["state"])
    for i in range(4):
        file |= {f"levels.{i}.blocks.0.gamma{j}": 1 + 0.3 * torch.randn(8 * 2**i) for j in (1, 2)}
    scaled.load_state_dict(checkpoint_filter_fn(file, scaled), strict=True)
    plain = InternImage(num_classes=7, **TINY).eval()
    plain.load_state_dict(checkpoint_filter_fn(file, plain), strict=True)
    torch.testing.assert_close(plain(image()), scaled(image()))


# -- the network in use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"groups": (3, 2, 4, 8)}, "groups=3 does not divide the 8 channels"),
        ({"groups": (1, 2)}, "names 4 stages and groups="),
        ({"level2_post_norm_block_ids": (2,)}, "names block 2; the third stage has 2 blocks"),
        ({"dw_kernel_size": 4}, "dw_kernel_size=4 is even"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(options, message):
    with pytest.raises(GraftError, match=message):
        InternImage(**{**SMALL, **options})


def test_the_operator_of_every_block_is_chosen_at_once():
    model = make("test_internimage", op_backend="torch")
    assert {m.op_backend for m in model.modules() if isinstance(m, DCNv3)} == {"torch"}
    wanted = model(image())
    model.set_op_backend(None)
    assert {m.op_backend for m in model.modules() if isinstance(m, DCNv3)} == {None}
    torch.testing.assert_close(model(image()), wanted, rtol=1e-4, atol=1e-5)
    model.set_op_backend("no such operator")
    with pytest.raises(GraftError, match="no such operator"):
        model(image())


def test_checkpointed_blocks_train_behind_a_frozen_stem():
    gradients = []
    for checkpointing in (False, True):
        model = make("test_internimage", num_classes=3)
        model.stem.requires_grad_(False)
        model.set_grad_checkpointing(checkpointing)
        model(image(2)).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0]["stages.0.blocks.0.dcn.offset.weight"] is not None
    for key, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][key] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][key])


def test_frozen_early_stages_have_no_backward():
    model = make("test_internimage", num_classes=3)
    tg.attach(model, "conv-adapter[downsample=false]", num_classes=3, include="stages[2:]")
    needs: dict[str, bool] = {}
    for i in (1, 2):
        dcn = model.stages[i].blocks[0].dcn
        for name in ("input_proj", "offset", "mask"):
            layer = getattr(dcn, name)
            layer.register_forward_hook(lambda m, a, out, n=f"{i}.{name}": needs.update({n: out.requires_grad}))
    for stage in model.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda m, a, out, s=stage: needs.update({f"{id(s)}": out.requires_grad}))
    model.train()(image()).mean().backward()
    assert [needs[str(id(stage))] for stage in model.stages] == [False, False, True, True]
    # Beside the depthwise convolution of the first adapted block: the values it mixes still need no gradient.
    assert [needs[f"{i}.{name}"] for i in (1, 2) for name in ("input_proj", "offset", "mask")] == [False] * 4 + [
        True
    ] * 2


def test_conv_adapter_stands_beside_the_depthwise_convolution_of_every_mixer():
    model = make("test_internimage")
    beside = [s.path for s in tg.anatomy(model).find("spatial_conv")]
    assert beside == [f"stages.{i}.blocks.{j}.dcn.dw_conv.0" for i, n in enumerate((1, 1, 2, 1)) for j in range(n)]
