from __future__ import annotations

import dataclasses
import time

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import torchgraft as tg


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def paths(found: tg.Anatomy, *roles: str) -> list[str]:
    return [s.path for s in found.find(*roles)]


@pytest.mark.parametrize(
    ("name", "stem", "heads"),
    [
        ("resnet18", "conv1", ["fc"]),
        ("resnet26d", "conv1.0", ["fc"]),
        ("convnext_atto", "stem.0", ["head.fc"]),
        ("efficientnet_lite0", "conv_stem", ["classifier"]),
        ("vit_tiny_patch16_224", "patch_embed.proj", ["head"]),
        ("deit_tiny_distilled_patch16_224", "patch_embed.proj", ["head", "head_dist"]),
        ("tresnet_m", "body.conv1.conv", ["head.fc"]),
        ("samvit_base_patch16_224", "patch_embed.proj", ["head.fc"]),
        ("repvit_m1", "stem.conv1.c", ["head.head.l", "head.head_dist.l"]),
        ("crossvit_tiny_240", "patch_embed.0.proj", ["head.0", "head.1"]),
        ("mobilevit_xxs", "stem.conv", ["head.fc"]),
        ("vgg11", "features.0", ["head.fc"]),
        ("naflexvit_base_patch16_parfac_gap", "embeds.proj", ["head"]),
    ],
)
def test_the_first_layer_and_the_classifiers_of_a_timm_model_are_found(name: str, stem: str, heads: list[str]) -> None:
    found = tg.anatomy(on_meta(name))
    assert (found.stem, found.heads) == (stem, heads)
    assert paths(found, "head") == heads


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("convnext_tiny", "classifier.2"),
        ("mobilenet_v3_small", "classifier.3"),
        ("vit_b_16", "heads.head"),
        ("squeezenet1_0", "classifier.1"),
    ],
)
def test_the_classifier_of_a_torchvision_model_is_what_makes_its_output(name: str, head: str) -> None:
    with torch.device("meta"):
        found = tg.anatomy(torchvision.models.get_model(name, weights=None))
    assert (found.head, found.heads) == (head, [head])


@pytest.mark.parametrize("options", [{"features_only": True}, {"features_only": True, "feature_cls": "getter"}])
def test_a_feature_extractor_has_no_classifier(options: dict[str, object]) -> None:
    found = tg.anatomy(timm.create_model("test_convnext", **options))
    assert (found.head, found.heads) == (None, [])


def test_a_removed_classifier_is_still_a_place_for_one() -> None:
    assert tg.anatomy(timm.create_model("test_resnet", num_classes=0)).head == "fc"


def test_convolutions_outside_blocks_are_stem_downsampling_or_neither() -> None:
    convnext = tg.anatomy(on_meta("convnext_atto"))
    assert paths(convnext, "stem") == ["stem.0"]
    assert paths(convnext, "downsample") == [f"stages.{i}.downsample.1" for i in (1, 2, 3)]
    resnet = tg.anatomy(on_meta("resnet26d"))
    assert paths(resnet, "stem") == ["conv1.0", "conv1.3", "conv1.6"]
    assert paths(resnet, "downsample") == []
    twins = tg.anatomy(on_meta("twins_svt_small"))  # lists all its patch embeddings ahead of the blocks
    assert paths(twins, "stem") == ["patch_embeds.0.proj"]
    assert "patch_embeds.3.proj" in paths(twins, "downsample")
    lite = tg.anatomy(on_meta("mobilevit_xxs"))
    assert lite.site("final_conv.conv").role == "conv"


def test_the_neck_and_the_heads_of_a_detector_are_no_spatial_sites() -> None:
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    found = tg.anatomy(model)
    assert found.base == "backbone.body"
    assert found.head is None
    assert {s.path.split(".")[1] for s in found.find("spatial_conv", "downsample")} == {"body"}
    assert len(found.find("spatial_conv")) == 16
    assert all(s.fires for s in found.sites)
    adapter = tg.attach(model, "conv-adapter")
    assert [s.address for s in adapter.sites] == [
        s.address for s in tg.attach(torchvision.models.resnet50(weights=None), "conv-adapter").sites
    ]


def test_a_detector_without_blocks_is_adapted_in_its_backbone_only() -> None:
    class Detector(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone, self.head = backbone, nn.Conv2d(512, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    with torch.device("meta"):
        vgg = tg.anatomy(torchvision.models.vgg11(weights=None))
        found = tg.anatomy(Detector(nn.Sequential(torchvision.models.vgg11(weights=None).features)))
        assert found.site("head").role == "conv"
    assert [s.address.removeprefix("0.") for s in found.find("spatial_conv")] == [
        s.address.removeprefix("features.") for s in vgg.find("spatial_conv")
    ]


def test_dilated_convolutions_of_a_segmentation_model_are_sites_like_others() -> None:
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    found = tg.anatomy(model)
    assert [s.kind for s in found.find("spatial_conv")].count("dilated-conv2d") == 8
    assert len(found.find("spatial_conv")) == 16


class ResidualUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu())


class Double(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.ReLU(), nn.Conv2d(cout, cout, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Double(3, 8)
        self.down = nn.ModuleList([Double(8, 8), Double(8, 8)])
        self.up, self.last = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.down:
            x = nn.functional.max_pool2d(layer(x), 2)
        return self.last(self.up(x))


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 1)), {"2"}),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 5)), {"2"}),
        (nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, (1, 3, 3))), {"2"}),
        (nn.Sequential(nn.Conv2d(3, 4, 3), ResidualUnit(), ResidualUnit()),
         {"1.conv1", "1.conv2", "2.conv1", "2.conv2"}),
        (UNet(), {"first.net.2", "down.0.net.0", "down.0.net.2", "down.1.net.0", "down.1.net.2", "up"}),
    ],
    ids=["flat", "1d", "3d", "units", "unet"],
)  # fmt: skip
def test_every_convolution_with_a_kernel_behind_the_stem_of_one_s_own_network_is_a_site(
    model: nn.Module, wanted: set[str]
) -> None:
    found = tg.anatomy(model)
    assert set(paths(found, "spatial_conv", "downsample")) == wanted
    assert {s.path for s in tg.attach(model, "conv-adapter").sites} == wanted


def test_a_stem_inside_the_first_block_is_still_the_stem() -> None:
    class ConvBlock(nn.Module):
        def __init__(self, cin: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(cin, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).relu()

    found = tg.anatomy(nn.Sequential(ConvBlock(3), ConvBlock(4), ConvBlock(4)))
    assert paths(found, "stem") == ["0.conv"]
    assert paths(found, "spatial_conv") == ["1.conv", "2.conv"]


def test_a_layer_that_is_named_exactly_is_a_spatial_site_whatever_its_role() -> None:
    model = on_meta("resnet18")
    for name in ("layer1.0.conv2", "stages[0].blocks[0].conv2", "blocks[0].conv2"):
        assert paths(tg.anatomy(model, include=name), "spatial_conv") == ["layer1.0.conv2"]
    mixed = tg.anatomy(model, include=["conv1", "layer2.0.downsample.*", "layer3.0"])
    assert paths(mixed, "spatial_conv") == ["conv1", "layer3.0.conv1"]
    vit = on_meta("test_vit")
    assert paths(tg.anatomy(vit, include="patch_embed.proj"), "spatial_conv") == ["patch_embed.proj"]


def test_a_glob_does_not_promote_what_it_meets() -> None:
    model = on_meta("resnet18")
    assert paths(tg.anatomy(model, include="*.conv?"), "spatial_conv") == paths(tg.anatomy(model), "spatial_conv")


def test_a_site_knows_its_layer() -> None:
    found = tg.anatomy(timm.create_model("test_convnext"))
    site = found.site("stages.1.blocks.0.conv_dw")
    assert site.address == "stages[1].blocks[0].conv_dw"
    assert (site.kind, site.kernel, site.block) == ("depthwise-conv2d", (7, 7), "stages.1.blocks.0")
    assert site.in_channels == site.out_channels
    assert site.fires is True
    assert site.to_dict() == dataclasses.asdict(site)
    other = found.site("stages.1.blocks.0.mlp.act")
    assert (other.role, other.block) == ("module", "stages.1.blocks.0")
    assert found.block_of("stem.0") is None
    assert {s.role for s in found.inside("stages.1.blocks.0", "norm", "spatial_conv")} == {"norm", "spatial_conv"}


def test_layers_that_are_used_without_being_called_do_not_fire() -> None:
    found = tg.anatomy(torchvision.models.swin_t(weights=None))
    assert {s.fires for s in found.find("attn.qkv", "attn.proj")} == {False}
    assert {s.fires for s in found.find("mlp.fc1", "mlp.fc2", "norm")} == {True}


def test_an_adapted_model_has_the_anatomy_it_had_before() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    before = tg.anatomy(model)
    tg.attach(model, "conv-adapter", num_classes=2)
    tg.activate(model, None)
    after = tg.anatomy(model)
    assert after.sites == before.sites
    assert (after.stages, after.heads, after.stem) == (before.stages, before.heads, before.stem)


def test_the_anatomy_changes_nothing_of_the_model() -> None:
    model = timm.create_model("test_efficientnet").train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tg.anatomy(model)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_anatomy_of_a_resnet50_takes_a_moment() -> None:
    model = timm.create_model("resnet50")
    times = []
    for _ in range(3):
        start = time.process_time()
        tg.anatomy(model)
        times.append(time.process_time() - start)
    assert min(times) < 0.4  # 0.12 s measured on one core of a server, most of it the dry run


SMALL = ["resnet18", "resnetv2_18", "regnety_004", "convnext_atto", "efficientnet_lite0", "mobilenetv3_small_050",
         "densenet121", "vgg11", "ghostnet_050", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
         "mixer_s32_224", "coatnet_nano_rw_224", "levit_128s", "csatv2", "hrnet_w18_small"]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_conv_adapter_finds_its_places_on_every_kind_of_backbone(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        found = tg.anatomy(model)
        adapter = tg.attach(model, "conv-adapter", num_classes=7)
    assert found.trace is not None
    assert len(adapter.sites) >= max(len(found.blocks), 7) - 2
    assert all(s.fires for s in adapter.sites)
