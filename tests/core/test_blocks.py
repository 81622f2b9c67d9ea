from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from torchgraft.core.blocks import find_stages, inner_modules


def stages(model: nn.Module) -> list[tuple[str, int]]:
    """(root, number of blocks) of every stage."""
    return [(s.root, len(s.blocks)) for s in find_stages(model)]


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def numbered(pattern: str, *counts: int, first: int = 0) -> list[tuple[str, int]]:
    return [(pattern.format(i + first), n) for i, n in enumerate(counts)]


TIMM = {
    "resnet18": numbered("layer{}", 2, 2, 2, 2, first=1),
    "resnet50d": numbered("layer{}", 3, 4, 6, 3, first=1),
    "res2net50_14w_8s": numbered("layer{}", 3, 4, 6, 3, first=1),
    "skresnet18": numbered("layer{}", 2, 2, 2, 2, first=1),
    "resnetv2_18": numbered("stages.{}", 2, 2, 2, 2),
    "resnetv2_50x1_bit": numbered("stages.{}", 3, 4, 6, 3),
    "nf_resnet26": numbered("stages.{}", 2, 2, 2, 2),
    "regnety_004": numbered("s{}", 1, 3, 6, 6, first=1),
    "convnext_atto": numbered("stages.{}", 2, 2, 6, 2),
    "efficientnet_lite0": numbered("blocks.{}", 1, 2, 2, 3, 3, 4, 1),
    "mobilenetv4_hybrid_medium": numbered("blocks.{}", 1, 2, 12, 16, 1),
    "densenet121": numbered("features.denseblock{}", 6, 12, 24, 16, first=1),
    "ghostnet_050": numbered("blocks.{}", 1, 1, 1, 1, 1, 1, 5, 1, 4, 1),
    "vgg11": [],
    "vit_tiny_patch16_224": [("blocks", 12)],
    "swin_tiny_patch4_window7_224": numbered("layers.{}", 2, 2, 6, 2),
    "maxvit_nano_rw_256": numbered("stages.{}", 1, 2, 3, 1),
    "mixer_s32_224": [("blocks", 8)],
    # several lists in one stage: pairs of blocks, branches, a list beside the main one
    "davit_tiny": numbered("stages.{}", 2, 2, 6, 2),
    "gcvit_xxtiny": numbered("stages.{}", 5, 4, 7, 3),
    "dla34": [("level2", 2), ("level3", 4), ("level4", 4), ("level5", 2)],
    # classes whose names say block but that hold a list of blocks
    "cspnext_tiny": [("stages.0", 1), ("stages.1", 1), ("stages.2", 1), ("stages.3", 2)],
    "fasternet_t0": numbered("stages.{}", 1, 2, 8, 2),
    "iformer_t": numbered("stages.{}", 2, 2, 13, 4),
    "crossvit_tiny_240": numbered("blocks.{}", 7, 7, 7),
    # what stands in the stem or in a downsampling module is no block
    "fastvit_t8": numbered("stages.{}", 2, 2, 4, 2),
    "shvit_s1": numbered("stages.{}", 2, 4, 5),
    # blocks without a telling name, blocks that are whole list elements, runs side by side
    "volo_d1_224": [("network.0", 4), ("network.2", 4), ("network.3", 8), ("network.4", 2), ("post_network", 2)],
    "convmixer_768_32": [("blocks", 32)],
    "cait_xxs24_224": [("", 26)],
    "nasnetalarge": [("", 22)],
}


@pytest.mark.parametrize("name", TIMM)
def test_the_blocks_of_a_timm_model_are_grouped_by_its_stages(name: str) -> None:
    assert stages(on_meta(name)) == TIMM[name]


def test_the_high_resolution_branches_of_one_stage_are_one_stage() -> None:
    assert stages(on_meta("hrnet_w18_small"))[:4] == [("layer1", 1), ("stage2", 4), ("stage3", 6), ("stage4", 8)]


@pytest.mark.parametrize(
    ("name", "wanted"),
    {
        "resnet50": numbered("layer{}", 3, 4, 6, 3, first=1),
        "convnext_tiny": [("features.1", 3), ("features.3", 3), ("features.5", 9), ("features.7", 3)],
        "mobilenet_v3_small": [("features", 11)],
        "efficientnet_b0": numbered("features.{}", 1, 2, 2, 3, 3, 4, 1, first=1),
        "densenet121": numbered("features.denseblock{}", 6, 12, 24, 16, first=1),
        "vgg11": [],
        "vit_b_16": [("encoder.layers", 12)],
        "swin_t": [("features.1", 2), ("features.3", 2), ("features.5", 6), ("features.7", 2)],
        "regnet_y_400mf": numbered("trunk_output.block{}", 1, 3, 6, 6, first=1),
    }.items(),
)
def test_the_blocks_of_a_torchvision_model_are_grouped_by_its_stages(name: str, wanted: list[tuple[str, int]]) -> None:
    # The RegNets of torchvision compute their widths with tensors that need data.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        assert stages(torchvision.models.get_model(name, weights=None)) == wanted


class Unit(nn.Module):
    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, kernel, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class ResidualUnit(Unit):
    pass


class Plain(Unit):
    pass


def test_a_network_of_one_s_own_is_read_by_the_names_of_its_classes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ResidualUnit(), ResidualUnit(), nn.Flatten())
    assert [(b.path, b.name) for s in find_stages(model) for b in s.blocks] == [
        ("1", "ResidualUnit"),
        ("2", "ResidualUnit"),
    ]


def test_where_no_name_tells_the_modules_that_repeat_in_a_list_are_the_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleList([Plain(), Plain()]))
    assert [b.path for s in find_stages(model) for b in s.blocks] == ["1.0", "1.1"]


def test_layers_that_repeat_in_a_list_are_no_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)))
    assert find_stages(model) == []


def test_another_module_that_stands_among_blocks_is_one_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ResidualUnit(), Plain(), nn.BatchNorm2d(4))
    assert [b.path for s in find_stages(model) for b in s.blocks] == ["1", "2"]


def test_numbered_siblings_count_like_a_list() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv0, self.unit1, self.unit2 = nn.Conv2d(3, 4, 3), ResidualUnit(), ResidualUnit()

    assert [b.path for s in find_stages(Net()) for b in s.blocks] == ["unit1", "unit2"]


def test_a_number_that_all_blocks_share_is_no_stage() -> None:
    inner = on_meta("vit_tiny_patch16_224", num_classes=0)
    (stage,) = find_stages(nn.Sequential(inner, nn.Linear(192, 5, device="meta")))
    assert (stage.root, stage.numbered, len(stage.blocks)) == ("0.blocks", False, 12)


def test_inner_modules_leave_out_the_module_itself_and_what_adapters_added() -> None:
    import torchgraft as tg

    model = timm.create_model("test_resnet", num_classes=3)
    before = [path for path, _ in inner_modules(model)]
    tg.attach(model, "conv-adapter", num_classes=2)
    assert [path for path, _ in inner_modules(model)] == before
    assert "" not in before
