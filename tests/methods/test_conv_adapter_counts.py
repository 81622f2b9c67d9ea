"""Conv-Adapter has the published number of parameters on every backbone, at every reduction."""

from __future__ import annotations

import pytest
import torch

import torchgraft as tg

from .networks import anatomy, count, count_with_head

REDUCTIONS = (1, 2, 4, 8, 16)

# Sites, then adapter parameters by reduction. "official" and "formula" figures agree with the code as published.
FIGURES = {
    "resnet50": (16, 1_302_784, 672_160, 356_848, 199_192, 120_364),
    "resnetv2_50x1_bit": (16, 1_302_784, 672_160, 356_848, 199_192, 120_364),
    "resnet101": (33, 2_469_120, 1_279_264, 684_336, 386_872, 238_140),
    "resnet152": (50, 3_432_704, 1_782_176, 956_912, 544_280, 337_964),
    "convnext_tiny": (21, 3_972_384, 2_157_792, 1_250_496, 796_848, 570_024),
    "convnext_small": (39, 6_986_016, 3_840_864, 2_268_288, 1_482_000, 1_088_856),
    "convnext_base": (39, 12_104_064, 6_515_840, 3_721_728, 2_324_672, 1_626_144),
    "convnext_large": (39, 26_524_224, 13_957_824, 7_674_624, 4_533_024, 2_962_224),
    "swin_base_patch4_window7_224": (24, 7_605_248, 4_109_440, 2_361_536, 1_487_584, 1_050_608),
    "swin_large_patch4_window7_224": (24, 16_642_560, 8_781_504, 4_850_976, 2_885_712, 1_903_080),
    "swin_tiny_patch4_window7_224": (12, 2_386_176, 1_305_696, 765_456, 495_336, 360_276),
    "resnet18": (8, 542_848, 279_968, 148_528, 82_808, 49_948),
    "regnety_040": (22, 5_883_904, 2_995_456, 1_551_232, 829_120, 468_064),
    "resnet50_clip": (16, 1_302_784, 672_160, 356_848, 199_192, 120_364),
}
INVERTED = {
    ("tf_efficientnetv2_m", "official"): (57, 3_521_168, 1_781_456, 911_600, 476_672, 259_146),
    ("tf_efficientnetv2_l", "official"): (79, 7_811_136, 3_942_256, 2_007_816, 1_040_596, 556_986),
    ("efficientnet_lite0", "official"): (16, 254_272, 129_704, 67_420, 36_278),
    ("efficientnet_lite0", "match"): (16, 283_328, 158_760, 96_476, 65_334),
    ("efficientnet_b0", "official"): (16, 254_272, 129_704, 67_420, 36_278),
    ("efficientnet_b0", "match"): (16, 283_328, 158_760, 96_476, 65_334),
    ("mobilenetv3_large_100", "official"): (16, 278_784, 142_172, 73_866, 39_713),
    ("mobilenetv3_large_100", "match"): (16, 295_872, 159_260, 90_954, 56_801),
}
SCHEMES = {
    ("resnet50", 4, "conv-sequential"): 356_848,
    ("resnet50", 4, "residual-parallel"): 4_481_040,
    ("resnet50", 4, "residual-sequential"): 5_199_808,
    ("resnet50", 8, "conv-sequential"): 199_192,
    ("resnet50", 8, "residual-parallel"): 2_314_664,
    ("resnet50", 8, "residual-sequential"): 2_682_976,
    ("resnet18", 4, "conv-sequential"): 195_680,
    ("resnet18", 4, "residual-parallel"): 148_528,
    ("resnet18", 4, "residual-sequential"): 195_680,
}
# Adapter, head for 100 classes and norms, reduction 4, by the published rule of what trains.
OFFICIAL_TOTALS = {
    "resnet50": 565_844,
    "convnext_tiny": 1_342_180,
    "convnext_base": 3_862_372,
    "swin_base_patch4_window7_224": 2_521_636,
    "tf_efficientnetv2_m": 1_039_700,
}


def sites(name: str, method: tg.Method) -> int:
    with torch.device("meta"):
        return len(method.placements(anatomy(name)))


@pytest.mark.parametrize("name", FIGURES)
def test_every_backbone_has_the_published_sites_and_parameters(name: str) -> None:
    number, *figures = FIGURES[name]
    assert sites(name, tg.ConvAdapter()) == number
    assert [count(name, tg.ConvAdapter(reduction=r)) for r in REDUCTIONS] == figures


@pytest.mark.parametrize(("name", "kernel"), INVERTED)
def test_inverted_residuals_have_the_published_parameters_for_either_kernel(name: str, kernel: str) -> None:
    number, *figures = INVERTED[name, kernel]
    assert sites(name, tg.ConvAdapter(kernel=kernel)) == number
    counted = [count(name, tg.ConvAdapter(reduction=r, kernel=kernel)) for r in REDUCTIONS[: len(figures)]]
    assert counted == figures


def test_clip_with_the_published_bottleneck_beside_its_attention_pooling_has_the_published_parameters() -> None:
    # The projection to CLIP's 1,024 dimensions is the classifier of timm's model.
    counted = [count("resnet50_clip", tg.ConvAdapter(reduction=r, preset="official"), 1_024) for r in REDUCTIONS]
    assert counted == [7_598_336, 3_820_960, 1_932_272, 987_928, 515_756]


def test_convnext_without_the_downsampling_sites_has_the_published_parameters() -> None:
    figures = [count("convnext_tiny", tg.ConvAdapter(reduction=r, downsample=False)) for r in REDUCTIONS]
    assert figures == [3_579_264, 1_958_544, 1_148_184, 743_004, 540_414]
    assert sites("convnext_tiny", tg.ConvAdapter(downsample=False)) == 18


@pytest.mark.parametrize(("name", "reduction", "scheme"), SCHEMES)
def test_every_scheme_has_the_published_parameters(name: str, reduction: int, scheme: str) -> None:
    assert count(name, f"conv-adapter[reduction={reduction}, scheme={scheme}]") == SCHEMES[name, reduction, scheme]


@pytest.mark.parametrize("name", OFFICIAL_TOTALS)
def test_the_official_preset_trains_the_published_total_for_100_classes(name: str) -> None:
    assert count_with_head(name, tg.ConvAdapter(preset="official")) == OFFICIAL_TOTALS[name]


def test_a_reduction_that_does_not_divide_the_channels_takes_the_largest_divisor_below() -> None:
    # RegNetY-016 has groups of 24: falling back to fewer groups would quadruple this (1,216,835).
    assert count("regnety_016", tg.ConvAdapter(reduction=16)) == 282_089


@pytest.mark.parametrize(
    ("name", "bottlenecks", "norms"), [("efficientnet_lite0", 158_760, 42_016), ("mobilenetv3_large_100", None, 24_400)]
)
def test_by_default_inverted_residuals_have_reduction_2_and_train_their_norms(
    name: str, bottlenecks: int | None, norms: int
) -> None:
    alone = count(name, tg.ConvAdapter(reduction=2))
    assert bottlenecks in (None, alone)
    assert count(name, tg.ConvAdapter()) == alone + norms
    assert count(name, tg.ConvAdapter(norms=False)) == alone
    assert count(name, tg.ConvAdapter(scheme="residual-parallel")) == count(name, tg.ConvAdapter(reduction=4))


def test_other_backbones_have_reduction_4_and_train_no_norms() -> None:
    assert count("resnet50", tg.ConvAdapter()) == count("resnet50", tg.ConvAdapter(reduction=4, norms=False)) == 356_848
