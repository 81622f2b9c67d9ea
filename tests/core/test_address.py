from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import timm.models._builder as builder
import torch
import torchvision
from torch import nn

import torchgraft as tg
from torchgraft.core.address import Selection

FAMILIES = [
    "resnet18",
    "resnet26d",
    "seresnet50",
    "resnetv2_50x1_bit",
    "resnext50_32x4d",
    "regnety_004",
    "regnetz_005",
    "convnext_atto",
    "convnextv2_atto",
    "efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mnasnet_small",
    "densenet121",
    "vgg11",
    "ghostnet_050",
    "ghostnetv2_100",
    "ghostnetv3_050",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "maxvit_nano_rw_256",
    "coatnet_nano_rw_224",
    "mixer_s32_224",
    "resmlp_12_224",
    "hrnet_w18_small",
    "fastvit_t8",
    "efficientvit_b0",
    "inception_resnet_v2",
    "qwen3_vit_88m",
    "cait_xxs24_224",
    "dpn48b",
    "xception41p",
]


class Origins:
    """Feature extractors that remember under which path each of their modules stood in the classifier."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: dict[int, str] = {}
        self._alive: list[nn.Module] = []
        for name in ("FeatureListNet", "FeatureHookNet", "FeatureGetterNet"):
            monkeypatch.setattr(builder, name, self._watched(getattr(builder, name)))

    def _watched(self, cls: type[nn.Module]) -> type[nn.Module]:
        origins = self

        class Watched(cls):  # type: ignore[misc, valid-type]
            def __init__(self, model: nn.Module, *args: object, **options: object) -> None:
                origins._alive += model.modules()  # a pruned module's id must not be given to another one
                origins.paths |= {id(m): p for p, m in model.named_modules()}
                super().__init__(model, *args, **options)

        return Watched


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def differing(whole: tg.Anatomy, twin: tg.Anatomy, origins: dict[int, str]) -> Iterator[tuple[str, str]]:
    """(address in the classifier, address in the twin) where the two are not the same."""
    for path, module in {"": twin.model, **twin.modules}.items():
        origin = origins.get(id(module))
        known = origin is not None and (origin in whole.modules or not origin)
        if known and whole.address(origin) != twin.address(path):  # type: ignore[arg-type]
            yield whole.address(origin), twin.address(path)  # type: ignore[arg-type]


def leads_back(found: tg.Anatomy) -> None:
    """Every module has an address of its own that leads back to it."""
    addresses = [found.address(p) for p in ["", *found.modules]]
    assert len(set(addresses)) == len(addresses)
    assert [found.path(a) for a in addresses] == ["", *found.modules]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_and_its_feature_extractors_have_the_same_addresses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tg.anatomy(on_meta(name))
    leads_back(whole)
    compared = 0
    for options in ({}, {"feature_cls": "getter"}):
        origins = Origins(monkeypatch)
        try:
            model = on_meta(name, features_only=True, **options)
        except (TypeError, AttributeError, RuntimeError):
            continue  # not every family has both kinds
        twin = tg.anatomy(model)
        leads_back(twin)
        paths = origins.paths or {id(m): p for p, m in model.named_modules()}
        assert sum(paths.get(id(m)) in whole.modules for m in twin.modules.values()) > 15
        assert list(differing(whole, twin, paths)) == []
        compared += 1
    assert compared


@pytest.mark.parametrize(
    "name", ["convnext_atto", "resnet26d", "test_vit", "densenet121", "cspnext_tiny", "volo_d1_224"]
)
def test_a_feature_extractor_that_ends_early_has_the_same_addresses_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    origins = Origins(monkeypatch)
    twin, whole = tg.anatomy(on_meta(name, features_only=True, out_indices=(0, 1))), tg.anatomy(on_meta(name))
    assert list(differing(whole, twin, origins.paths)) == []
    roles = {s.address: s.role for s in whole.sites}
    assert {s.address: s.role for s in twin.sites if s.address in roles}.items() <= roles.items()


@pytest.mark.parametrize(
    ("detector", "inside"),
    [
        (torchvision.models.detection.fasterrcnn_resnet50_fpn, "backbone.body"),
        (torchvision.models.segmentation.fcn_resnet50, "backbone"),
        (torchvision.models.segmentation.deeplabv3_resnet50, "backbone"),
    ],
)
def test_a_backbone_inside_a_detector_has_the_addresses_of_the_classifier(detector: object, inside: str) -> None:
    classifier = tg.anatomy(torchvision.models.resnet50(weights=None))
    found = tg.anatomy(detector(weights=None, weights_backbone=None))  # type: ignore[operator]
    own = [p for p in found.modules if p.startswith(inside + ".")]
    assert {found.address(p) for p in own} == {
        classifier.address(p) for p in classifier.modules if not p.startswith(("fc", "avgpool"))
    }
    assert all(found.address(p) == classifier.address(p.removeprefix(inside + ".")) for p in own)
    assert found.address(inside) == ""
    assert all(found.path(found.address(p)) == p for p in ["", *found.modules])


@pytest.mark.parametrize("name", ["ViT", "ConvNext", "Bert"])
def test_a_transformers_classifier_and_its_plain_model_have_the_same_addresses(name: str) -> None:
    import transformers as hf

    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
               "image_size": 32, "patch_size": 8, "vocab_size": 9}  # fmt: skip
    if name == "ConvNext":
        options = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    config = getattr(hf, f"{name}Config")(**options)
    plain = tg.anatomy(getattr(hf, f"{name}Model")(config))
    head = "Sequence" if name == "Bert" else "Image"
    classifier = tg.anatomy(getattr(hf, f"{name}For{head}Classification")(config))
    assert {plain.address(p) for p in plain.modules if "pooler" not in p} <= {
        classifier.address(p) for p in classifier.modules
    } | {"layernorm"}


def test_an_address_that_two_modules_could_have_belongs_to_the_backbone() -> None:
    backbone = timm.create_model("test_vit", num_classes=0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = backbone, nn.LayerNorm(64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.body(x))

    found = tg.anatomy(Net())
    assert (found.address("body.norm"), found.address("norm"), found.address("body")) == ("norm", "outer.norm", "")
    assert found.path("outer.norm") == "norm"


def test_a_wrong_address_is_answered_with_the_nearest_ones() -> None:
    found = tg.anatomy(timm.create_model("test_resnet"))
    with pytest.raises(tg.GraftError, match=r"stages\[0\]\.blocks\[0\]\.conv1"):
        found.path("stages[0].blocks[0].convl")
    with pytest.raises(tg.GraftError, match="no module 'layerl'"):
        found.address("layerl")


def chosen(model: nn.Module, include: object = None, exclude: object = None, role: str = "block") -> list[str]:
    return [s.path for s in tg.anatomy(model, include=include, exclude=exclude).find(role)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return on_meta("resnet18")


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return on_meta("test_vit")


ALL = [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("layer1.0", ["layer1.0"]),
        ("layer2", ["layer2.0", "layer2.1"]),
        ("layer[34].*", ALL[4:]),
        ("layer?.1", ALL[1::2]),
        ("stages[2:].blocks[-1:]", ["layer3.1", "layer4.1"]),
        ("stages[1]", ["layer2.0", "layer2.1"]),
        ("stages[-1].blocks[0]", ["layer4.0"]),
        ("stages[::2].blocks[0]", ["layer1.0", "layer3.0"]),
        ("stages[:].blocks[:]", ALL),
        ("stages[0:2]", ALL[:4]),
        ("blocks[-3:]", ALL[-3:]),
        ("blocks[3]", ["layer2.1"]),
        (["layer1.0", "stages[3].blocks[-1]"], ["layer1.0", "layer4.1"]),
    ],
)
def test_patterns_choose_blocks(resnet: nn.Module, pattern: object, wanted: list[str]) -> None:
    assert chosen(resnet, pattern) == wanted


def test_patterns_reach_into_blocks(resnet: nn.Module) -> None:
    assert chosen(resnet, "stages[1].blocks[0].conv1", role="spatial_conv") == ["layer2.0.conv1"]
    assert chosen(resnet, "stages[:].blocks[0].bn1", role="norm") == [f"layer{s}.0.bn1" for s in (1, 2, 3, 4)]
    assert chosen(resnet, "stages[-1].blocks[-1].bn*", role="norm") == ["layer4.1.bn1", "layer4.1.bn2"]
    assert chosen(resnet, "*.conv1", role="spatial_conv") == [f"{p}.conv1" for p in ALL]


def test_what_is_excluded_is_left_out_of_what_is_included(resnet: nn.Module) -> None:
    assert chosen(resnet, "stages[2:]", "stages[:].blocks[0]") == ["layer3.1", "layer4.1"]
    assert chosen(resnet, None, ["layer1", "blocks[-5:]"]) == ["layer2.0"]


def test_a_model_of_one_stage_may_be_addressed_with_or_without_it(vit: nn.Module) -> None:
    assert chosen(vit, "blocks[-2:]") == chosen(vit, "stages[0].blocks[-2:]") == ["blocks.4", "blocks.5"]
    assert chosen(vit, "blocks[:].norm1", role="norm") == [f"blocks.{i}.norm1" for i in range(6)]
    assert chosen(vit, "blocks[-1].attn.qkv", role="attn.qkv") == ["blocks.5.attn.qkv"]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer9", "layer4"),
        ("stages[4]", r"stages\[3\]"),
        ("stages[0].blocks[7]", r"stages\[0\]"),
        ("stages[0].blocks[0].conv7", r"conv1"),
        ("blocks[99]", "names no module"),
        ("*.qkv", "names no module"),
        ("stages[]", "names no module"),
        ("stages[0:1:0]", "names no module"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_names(
    resnet: nn.Module, pattern: str, hint: str
) -> None:
    with pytest.raises(tg.GraftError, match=hint):
        tg.anatomy(resnet, include=pattern)
    with pytest.raises(tg.GraftError, match=hint):
        tg.anatomy(resnet, include="layer1", exclude=[pattern])


@pytest.mark.parametrize("pattern", [[], [""], [3], ""])
def test_a_selection_of_something_else_than_names_is_refused(resnet: nn.Module, pattern: object) -> None:
    with pytest.raises(tg.GraftError, match="expected a module path"):
        tg.anatomy(resnet, include=pattern)  # type: ignore[arg-type]


def canonical(model: nn.Module, *patterns: str) -> list[str] | None:
    found = tg.anatomy(model)
    selection = Selection(list(patterns), None, [len(s.blocks) for s in found.stages])
    return selection.canonical((p, found.address(p)) for p in found.modules)[0]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("layer2.0.conv1", ["stages[1].blocks[0].conv1"]),
        ("stages[-1].blocks[-1].conv2", ["stages[3].blocks[1].conv2"]),
        ("stages[1:].blocks[0]", ["stages[1:].blocks[0]"]),
        ("layer2", ["~stages[1]"]),
        ("layer?.1", [f"~stages[{s}].blocks[1]" for s in range(4)]),
        ("stages[-1]", ["~stages[3]"]),
        ("blocks[-2:]", ["~stages[3].blocks[0]", "~stages[3].blocks[1]"]),
    ],
)
def test_the_canonical_form_of_a_pattern_counts_from_the_front(
    resnet: nn.Module, pattern: str, wanted: list[str]
) -> None:
    assert canonical(resnet, pattern) == wanted


@pytest.mark.parametrize("pattern", ["features.denseblock3", "features", "stages[-2:].blocks[-1:]", "*.conv2"])
def test_the_canonical_form_chooses_the_same_layers_on_a_twin(pattern: str) -> None:
    small = {"block_config": (1, 2, 2, 1)}
    whole, twin = on_meta("densenet121", **small), on_meta("densenet121", features_only=True, **small)
    here, there = tg.anatomy(whole, include=pattern), tg.anatomy(twin, include=canonical(whole, pattern))
    assert [s.address for s in here.find("spatial_conv")] == [s.address for s in there.find("spatial_conv")]
    assert canonical(whole, *(canonical(whole, pattern) or [])) == canonical(whole, pattern)


def test_a_twin_may_lack_what_a_canonical_form_names(resnet: nn.Module) -> None:
    twin = on_meta("resnet18", features_only=True, out_indices=(0, 1, 2))
    found = tg.anatomy(twin, include=canonical(resnet, "layer?.1"))
    assert [s.address for s in found.find("block")] == ["stages[0].blocks[1]", "stages[1].blocks[1]"]
