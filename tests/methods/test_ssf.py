"""SSF: a pair behind every layer that the published code has one behind, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm.models as tm
import torch
import transformers as hf
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Affine
from torchgraft.methods.ssf import SSF
from torchgraft.official import load_official

from .networks import count, count_with_head, images, tiny

# Parameters without the head: sites="official" and sites="all", where published code or spec has a figure.
FIGURES = {
    "vit_tiny_patch16_224": (51_456, 51_456),
    "vit_small_patch16_224": (102_912, 102_912),
    "vit_base_patch16_224": (205_824, 205_824),
    "vit_large_patch16_224": (544_768, 544_768),
    "swin_tiny_patch4_window7_224": (99_072, 107_136),
    "swin_small_patch4_window7_224": (200_448, None),
    "swin_base_patch4_window7_224": (267_264, 278_016),
    "swin_large_patch4_window7_224": (400_896, None),
    "convnext_tiny": (94_656, 98_688),
    "convnext_small": (191_424, None),
    "convnext_base": (255_232, 260_608),
    "convnext_large": (382_848, None),
    "resnet18": (19_200, 19_200),
    "resnet50": (106_240, 106_240),
}
PAGE = Path(__file__).parents[2] / "docs" / "methods" / "ssf.md"


@pytest.mark.parametrize("name", FIGURES)
def test_counts_are_those_of_the_published_code(name: str) -> None:
    official, everywhere = FIGURES[name]
    assert count(name, "ssf") == official
    assert everywhere in (None, count(name, "ssf[sites=all]"))


def test_the_page_has_the_same_counts() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= len(FIGURES)
    for name, *numbers in rows:
        official, everywhere = (int(n.replace(",", "")) for n in numbers)
        assert (count(name, "ssf"), count(name, "ssf[sites=all]")) == (official, everywhere), name


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("vit_base_patch16_224", 282_724),
        ("swin_base_patch4_window7_224", 369_764),
        ("convnext_base", 359_780),
        ("convnext_tiny", 173_092),
    ],
)
def test_what_trains_with_a_head_for_100_classes_is_as_published(name: str, trained: int) -> None:
    assert count_with_head(name, "ssf[preset=official]") == trained


def _homes(model: nn.Module, method: str = "ssf") -> list[str]:
    return [p.home for p in tg.method(method).placements(tg.anatomy(model))]


def test_the_sites_of_a_vit_are_the_published_ones() -> None:
    block = [f"blocks.0.{n}" for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    model = tm.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    assert _homes(model) == ["patch_embed.proj", *block, "norm"]
    assert _homes(model, "ssf[sites=all]") == _homes(model)


def test_the_layers_between_the_stages_are_left_out_unless_all_are_asked_for() -> None:
    for name, between, last in (("swin", "downsample", "norm"), ("test_convnext", "downsample", "stages.3.blocks.1")):
        official, everywhere = _homes(tiny(name)), _homes(tiny(name), "ssf[sites=all]")
        assert not any(between in home for home in official)
        assert [home for home in everywhere if between not in home] == official
        assert len(everywhere) > len(official)
        assert official[-1] == last
        assert not any("head" in home for home in everywhere)


def test_a_vit_that_pools_before_its_norm_has_the_published_pair_before_the_pooling() -> None:
    model = tm.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3, global_pool="avg"
    )
    assert _homes(model)[-1] == "norm"
    assert _homes(model, "ssf[sites=all]")[-1] == "fc_norm"


def test_other_networks_have_a_pair_behind_every_convolution_and_every_norm() -> None:
    model = tiny("test_resnet")
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    assert sorted(_homes(model)) == sorted(layers)


def test_the_classifier_and_a_tied_output_layer_have_none() -> None:
    config = hf.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    homes = _homes(hf.T5ForConditionalGeneration(config))
    assert "lm_head" not in homes
    assert {"encoder.block.0.layer.0.SelfAttention.q", "decoder.final_layer_norm"} <= set(homes)
    assert not {"fc", "head"} & set(_homes(tiny("test_resnet")))


def test_include_confines_the_pairs() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, "ssf", include="blocks.1", example=((images(),), {}))
    assert {s.block for s in adapter.sites} == {"blocks.1"}


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(tg.GraftError, match="ssf: Sequential has no linear layer, convolution or norm"):
        tg.attach(nn.Sequential(nn.ReLU()), "ssf", example=((torch.randn(1, 3),), {}))


# -- acting -------------------------------------------------------------------------------------------------


def test_a_map_as_wide_as_it_has_channels_is_scaled_by_its_channels() -> None:
    """The published helper looks for the axis of the length C, last first: there it would scale columns."""
    model = tm.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)  # the stem's map has 8 channels and is 8 wide
    seen: list[Tensor] = []
    model.stem[1].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model(x)
    adapter = tg.attach(model, "ssf", example=((x,), {}))
    seen.clear()
    model(x)
    pair = next(p for _, p in adapter.placements if p.home == "stem.1")
    with torch.no_grad():
        pair.scale[3] = 5.0
        pair.shift[3] = 1.0
    model(x)
    before, after = seen
    assert before.shape == (1, 8, 8, 8)
    changed = before.clone()
    changed[:, 3] = before[:, 3] * 5 + 1
    torch.testing.assert_close(after, changed)


def test_it_starts_as_the_network_to_the_bit_and_as_published_on_demand() -> None:
    model = tiny("test_convnext")
    plain = model(images())
    tg.attach(model, "ssf")
    assert torch.equal(model(images()), plain)
    tg.detach(model)
    for spec in ("ssf[init=official]", "ssf[preset=official]"):
        torch.manual_seed(0)
        adapter = tg.attach(model, spec)
        pairs = [p for _, p in adapter.placements if isinstance(p, Affine)]
        for name, mean in (("scale", 1.0), ("shift", 0.0)):
            values = torch.cat([p._parameters[name] for p in pairs]).detach()
            assert abs(values.mean() - mean) < 2e-3
            assert abs(values.std() - 0.02) < 2e-3
        assert not torch.allclose(model(images()), plain)
        tg.detach(model)


def test_the_classifiers_norm_trains_only_as_published() -> None:
    model = tiny("test_convnext")
    for spec, trained in (("ssf", False), ("ssf[preset=official]", True)):
        adapter = tg.attach(model, spec, num_classes=5)
        assert any(p.kind == "train" and p.home == "head.norm" for _, p in adapter.placements) == trained
        tg.detach(model)


def test_a_norm_with_its_activation_inside_is_scaled_before_the_activation() -> None:
    model = tiny("test_efficientnet")
    adapter = tg.attach(model, "ssf")
    norm = model.bn1
    pair = next(p for _, p in adapter.placements if p.home == "bn1")
    with torch.no_grad():
        pair.scale.fill_(-1.0)
    x = torch.randn(1, norm.num_features, 4, 4)
    plain = nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm._parameters["weight"], norm._parameters["bias"], eps=norm.eps
    )
    torch.testing.assert_close(norm(x), norm.act(-plain))


@pytest.mark.parametrize("make", [tm.Beit, tm.Eva])
def test_a_fused_qkv_whose_biases_stand_beside_it_is_scaled_and_shifted_as_one(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = make(**sizes).eval()
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.q_bias.normal_()
        attention.v_bias.normal_()
    x = torch.randn(1, 5, 16)
    adapter = tg.attach(model, "ssf", include="blocks.0.attn*")
    scale, shift = torch.randn(3, 16), torch.randn(3, 16)
    with torch.no_grad():
        for i, letter in enumerate("qkv"):
            for _, p in adapter.placements:
                if p.slot == f"affine_{letter}" and p.scale is not None:
                    p.scale.copy_(scale[i])
                    if p.shift is not None:
                        p.shift.copy_(shift[i])
    weight = attention.qkv._parameters["weight"] * scale.flatten()[:, None]
    assert torch.equal(attention.qkv.weight, weight)
    for i, letter in ((0, "q"), (2, "v")):
        name = f"{letter}_bias"
        torch.testing.assert_close(getattr(attention, name), attention._parameters[name] * scale[i] + shift[i])
    names = [n for n, _ in adapter.named_parameters()]
    assert len(names) == 5 + 2, "three scales and two shifts of qkv, and the pair of proj"
    out = attention(x)
    tg.merge(model)
    torch.testing.assert_close(attention(x), out, rtol=1e-4, atol=1e-5)


def test_the_leftovers_of_a_merge_are_named() -> None:
    config = hf.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    left = {
        "the last map": (tiny("test_convnext"), {"stages[3].blocks[1]"}),
        "norms without a bias": (hf.T5ForConditionalGeneration(config).eval(), None),
        "nothing": (tiny("test_vit"), set()),
    }
    for model, wanted in left.values():
        tg.attach(model, "ssf")
        report = tg.merge(model)
        stays = {s.address for s in report.sites if not s.merged}
        if wanted is None:
            assert stays
            assert all("layer_norm" in s for s in stays)
        else:
            assert stays == wanted
        assert report.complete == (not stays)


# -- official checkpoints -----------------------------------------------------------------------------------

HOSTS = {
    "vit": lambda classes: tm.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=classes
    ),
    "swin": lambda classes: tiny("swin", classes),
    "convnext": lambda classes: tiny("test_convnext", classes),
}


def _official_name(home: str, slot: str) -> str:
    """The published name of the pair at one of our modules."""
    if slot == "last" or home == "norm":
        return "ssf_{}_1"
    home = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", home)
    holder, _, leaf = home.rpartition(".")
    second = leaf in ("norm2", "fc2", "reduction") or (leaf == "proj" and holder.endswith("attn"))
    second = second or (leaf == "norm" and not holder.endswith("downsample")) or (leaf == "1" and holder != "")
    return f"{holder}.ssf_{{}}_{2 if second else 1}"


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("sites", ["official", "all"])
def test_a_published_checkpoint_gives_the_adapter_that_wrote_it(host: str, sites: str) -> None:
    torch.manual_seed(0)
    model = HOSTS[host](0).eval()
    side = 16 if host == "vit" else 32
    adapter = tg.attach(model, SSF(sites=sites, preset="official"), num_classes=7, name="ours")
    x = torch.randn(1, 3, side, side)
    head = "head.fc" if host == "convnext" else "head"
    state = {f"{head}.{n}": t for n, t in (("weight", adapter.head.weight), ("bias", adapter.head.bias))}
    for _, p in adapter.placements:
        if isinstance(p, Affine):
            name = _official_name(p.home, p.slot)
            state |= {name.format("scale"): p.scale, name.format("shift"): p.shift}
        elif p.kind == "train":
            state |= {f"{p.home}.{n}": t for n, t in p.owned().items()}
    wanted = model(x)
    loaded = load_official(model, {k: v.detach().clone() for k, v in state.items()}, system="ssf", name="theirs")
    # A ViT has nothing between stages, so its checkpoint does not tell the two apart, and need not.
    assert loaded.method == SSF(sites="official" if host == "vit" else sites, preset="official")
    assert torch.equal(model(x), wanted)
    with pytest.raises(tg.GraftError, match=r"unknown key 'blocks\.0\.ssf_scale_9'"):
        load_official(model, {**state, "blocks.0.ssf_scale_9": x}, system="ssf", name="broken")
