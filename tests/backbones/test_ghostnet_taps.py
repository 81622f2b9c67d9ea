"""timm's GhostNets: their sizes, official names, and taps at the last block of every level."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import FeatureListNet
from timm.models.ghostnet import GhostNet, checkpoint_filter_fn

from torchgraft.backbones import create_features
from torchgraft.backbones.facts import counted_facts
from torchgraft.backbones.taps import correct_taps
from torchgraft.backbones.timm_api import FeatureGetterNet

from ..golden.files import read_case

LEVELS = (1, 2, 3, 4)
"""The taps of stride 4, 8, 16 and 32."""


def image(side=64):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name, parameters, gmacs",
    [("ghostnet_050", 2_587_292, 0.042), ("ghostnet_100", 5_182_508, 0.141), ("ghostnet_130", 7_358_820, 0.227)],
)
def test_timms_sizes_are_the_published_ones(name, parameters, gmacs):
    facts = counted_facts(name)
    assert (facts.parameters, facts.gmacs) == (parameters, gmacs)


def test_a_width_that_has_no_name_in_timm_has_the_published_size():
    rows = timm.create_model("ghostnet_100", device="meta").cfgs
    assert count(GhostNet(rows, width=1.1, device="meta")) == 5_855_650


@pytest.mark.parametrize(
    "name, widths",
    [
        ("ghostnet_050", (8, 12, 20, 56, 80)),
        ("ghostnet_100", (16, 24, 40, 112, 160)),
        ("ghostnet_130", (20, 32, 52, 144, 208)),
        ("ghostnetv2_100", (16, 24, 40, 112, 160)),
        ("ghostnetv3_100", (16, 24, 40, 112, 160)),
        ("repghostnet_100", (16, 24, 40, 112, 160)),
    ],
)
def test_every_level_is_tapped_behind_its_last_block(name, widths):
    model = timm.create_model(name, device="meta").eval()
    size = count(model)
    assert correct_taps(model) is model
    assert count(model) == size
    assert model.stage_ends == [-1, 2, 4, 6, 8]
    assert [tap["module"] for tap in model.feature_info] == ["conv_stem", *(f"blocks.{i}" for i in (2, 4, 6, 8))]
    assert tuple(tap["num_chs"] for tap in model.feature_info) == widths
    assert [tap["reduction"] for tap in model.feature_info] == [2, 4, 8, 16, 32]
    maps = model.forward_intermediates(image().to("meta"), intermediates_only=True)
    assert tuple(m.shape[1] for m in maps) == widths
    assert [64 // m.shape[-1] for m in maps] == [2, 4, 8, 16, 32]


def test_correcting_twice_or_another_model_changes_nothing():
    model = correct_taps(timm.create_model("ghostnet_050", device="meta"))
    once = copy.deepcopy(model.feature_info), list(model.stage_ends)
    correct_taps(model)
    assert (model.feature_info, model.stage_ends) == once
    resnet = timm.create_model("test_resnet")
    taps = copy.deepcopy(resnet.feature_info)
    assert correct_taps(resnet) is resnet
    assert resnet.feature_info == taps and not hasattr(resnet, "stage_ends")


def test_both_wrappers_keep_all_levels_and_give_equal_maps():
    torch.manual_seed(0)
    whole = correct_taps(timm.create_model("ghostnet_100")).eval()
    listed = FeatureListNet(copy.deepcopy(whole), out_indices=LEVELS, flatten_sequential=True).eval()
    getter = FeatureGetterNet(copy.deepcopy(whole), out_indices=LEVELS).eval()
    assert count(listed) == count(getter) == 2_515_908
    wanted = whole.forward_intermediates(image(), indices=list(LEVELS), intermediates_only=True)
    for a, b, c in zip(listed(image()), getter(image()), wanted, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)


def test_the_corrected_maps_need_every_parameter_that_is_kept_and_can_be_scripted():
    model = correct_taps(timm.create_model("ghostnet_050"))
    getter = FeatureGetterNet(model, out_indices=LEVELS).eval()
    maps = getter(image())
    for a, b in zip(torch.jit.script(getter)(image()), maps, strict=True):
        torch.testing.assert_close(a, b)
    sum(m.mean() for m in maps).backward()
    assert not [n for n, p in getter.named_parameters() if p.grad is None]


def test_our_pyramid_has_the_corrected_taps_and_timms_on_demand():
    ours = create_features("ghostnet_100", pretrained=False)
    assert ours.channels == (24, 40, 112, 160) and count(ours) == 2_515_908
    theirs = create_features("ghostnet_100", pretrained=False, taps="timm")
    assert theirs.channels == (24, 40, 80, 160) and count(theirs) == 948_388


@torch.no_grad()
def test_official_names_load_unchanged_and_counters_of_a_profiler_are_left_out():
    case = read_case(Path(__file__).parents[1] / "golden" / "cases", "c_ghostnet")
    columns, rows = case.config["cfg_columns"], case.config["cfgs"]
    assert columns == ["kernel", "expansion", "out", "se_ratio", "stride"]
    model = GhostNet(rows, num_classes=case.config["num_classes"], width=case.config["width"]).eval()
    state = dict(case.tensors["state"])
    counted = {"state_dict": {**state, "conv_stem.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}}
    converted = checkpoint_filter_fn(counted, model)
    assert converted.keys() == state.keys()
    model.load_state_dict(converted, strict=True)
    torch.testing.assert_close(model(case.tensors["input"]["image"]), case.tensors["output"]["logits"])
