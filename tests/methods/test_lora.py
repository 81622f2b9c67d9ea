"""LoRA: published counts, the sites it chooses, its options, and the same outputs as peft's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import transformers as hf
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

import torchgraft as tg
from torchgraft.core.placements import WeightDelta
from torchgraft.methods import LoRA

from ..core.attaching import Remembered, assert_close, disturb, run
from .networks import count, images, tiny, train_step
from .peft_layers import LAYERS, Host

COUNTS = [
    ("vit_base_patch16_224", "lora", 294_912),
    ("vit_base_patch16_224", "lora[rank=4]", 147_456),
    ("vit_base_patch16_224", "lora[targets=[q, k, v, proj]]", 589_824),
    ("vit_base_patch16_224", "lora[targets=qkv]", 294_912),
    ("vit_base_patch16_224", "lora[targets=[fc1, fc2]]", 737_280),
    ("vit_base_patch16_224", "lora[targets=all]", 1_179_648),
    ("vit_base_patch16_224", "lora[dora=true]", 294_912 + 12 * 2 * 768),
    ("swin_base_patch4_window7_224", "lora", 385_024),
    ("convnext_tiny", "lora", 589_968),
    ("convnext_tiny", "lora[targets=conv]", 60_048),
    ("resnet50", "lora", 633_856),
    ("resnet50", "lora[targets=conv]", 302_080),
]


@pytest.mark.parametrize(("backbone", "method", "wanted"), COUNTS)
def test_the_number_of_parameters_is_that_of_the_formula(backbone: str, method: str, wanted: int) -> None:
    assert count(backbone, method) == wanted


DOCS = Path(__file__).parents[2] / "docs" / "methods"


@pytest.mark.parametrize("page", ["lora.md", "ia3.md"])
def test_the_tables_of_the_documentation_are_right(page: str) -> None:
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| backbone |"))
    methods = [c.strip("` ") for c in lines[start].strip("|").split("|")[1:]]
    rows = [line.strip("|").split("|") for line in lines[start + 2 : start + 6]]
    assert len(rows) == 4
    for name, *values in rows:
        for method, value in zip(methods, values, strict=True):
            spec = method if method != "parameters" else "ia3"
            assert count(name.strip("` "), spec) == int(value.replace(",", "")), (name, method)


def test_on_a_convnet_every_convolution_of_the_blocks_counts_rank_times_its_two_sides() -> None:
    model = timm.create_model("resnet50", num_classes=0)
    convs = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n.startswith("layer")]
    assert sum(8 * (m.out_channels + m.weight[0].numel()) for m in convs) == count("resnet50", "lora")


# -- sites -----------------------------------------------------------------------------------------------


def changed_rows(model: nn.Module, path: str, x: Tensor, **options: Any) -> list[int]:
    """Which rows of the output of the layer at ``path`` a disturbed LoRA changes."""
    seen: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    run(model, x)
    disturb(tg.attach(model, LoRA(**options), include=path, example=((x,), {})))
    run(model, x)
    change = (seen[-1] - seen[0]).flatten(0, -2).abs().amax(0)
    return [int(i) for i in (change > 1e-6).nonzero().flatten()]


def test_q_and_v_of_a_fused_projection_change_and_k_does_not() -> None:
    assert changed_rows(tiny("test_vit"), "blocks.1.attn.qkv", images()) == [*range(64), *range(128, 192)]


@pytest.mark.parametrize(
    ("name", "layer", "rows"),
    [("pvt_v2_b0", "stages.3.blocks.0.attn.kv", range(16, 32)), ("convit_tiny", "blocks.0.attn.qk", range(24))],
)
def test_projections_fused_in_two_have_their_own_halves(name: str, layer: str, rows: range) -> None:
    small = {"embed_dims": (8, 8, 8, 16), "num_heads": (1, 1, 1, 2), "depths": (1, 1, 1, 1)}
    model = timm.create_model(name, **(small if "pvt" in name else {"embed_dim": 12, "depth": 1, "num_heads": 2}))
    assert changed_rows(model.eval(), layer, torch.randn(1, 3, 224, 224)) == list(rows)


def test_separate_projections_and_those_of_nn_multihead_attention_are_found() -> None:
    encoder = hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30
    )
    bert = tg.attach(hf.BertForSequenceClassification(encoder), "lora")
    assert {s.path.rpartition(".")[2] for s in bert.sites} == {"query", "value"}
    block = EncoderBlock(2, 8, 16, 0.0, 0.0, nn.LayerNorm).eval()
    x = torch.randn(2, 5, 8)
    remembered = Remembered(block, x)
    adapter = disturb(
        tg.attach(block, "lora[rank=2]", include=["self_attention", "self_attention.out_proj"], example=((x,), {}))
    )
    assert {n.partition("/")[2] for n in adapter.state_dict()} == {
        f"{part}.{side}" for part in ("q", "v", "delta") for side in ("down", "up")
    }
    apart = run(block, x)
    tg.merge(block, probe=x)
    assert_close(run(block, x), apart)
    tg.detach(_unmerged(block))
    remembered.assert_same()


def _unmerged(model: nn.Module) -> nn.Module:
    tg.unmerge(model)
    return model


def test_queries_that_stand_head_by_head_are_changed_with_the_whole_projection_or_refused() -> None:
    model = timm.create_model("test_coatnet", img_size=64).eval()
    fused = next(m for n, m in model.named_modules() if n.endswith("attn.qkv"))
    adapter = tg.attach(model, "lora")
    assert {tuple(p.form.shape) for _, p in adapter.placements} >= {tuple(fused.weight.shape)}
    with pytest.raises(tg.GraftError, match=r"lora: .* cannot be told apart; use targets=qkv"):
        tg.attach(timm.create_model("test_coatnet", img_size=64), "lora[targets=[q, v]]")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("levit_128s", {"q", "v"}), ("tiny_vit_5m_224", {"q", "v"}), ("efficientvit_b0", {"q", "v"})],
)
def test_other_projections_by_head_are_not_cut(name: str, parts: set[str]) -> None:
    with pytest.raises(tg.GraftError, match="told apart"):
        count(name, LoRA(targets=tuple(parts)))
    assert count(name, "lora") > 0


def test_any_kind_of_convolution_takes_it_and_merges() -> None:
    class Convolutions(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(4, 6, 3, padding=2, dilation=2),
                nn.Conv2d(6, 6, 3, groups=2, stride=2, padding=1, padding_mode="reflect"),
                nn.Conv2d(6, 6, 7, groups=6, padding=3),
                Conv2dSame(6, 6, 3, stride=2),
                nn.ConvTranspose2d(6, 4, 2, stride=2),
                StdConv2d(4, 4, 3),
            )

    torch.manual_seed(0)
    model, x = Convolutions().eval(), torch.randn(2, 4, 17, 16)
    remembered = Remembered(model, x)
    names = [str(i) for i in range(6)]
    adapter = disturb(tg.attach(model, "lora[targets=all]", include=names, example=((x,), {})))
    ranks = {p.home: p.form.up.shape[1] for _, p in adapter.placements}
    assert ranks == {"0": 6, "1": 6, "2": 6, "3": 6, "4": 6, "5": 4}, "the rank is at most the smaller side"
    apart = run(model, x)
    report = tg.merge(model, probe=x)
    assert report.complete
    assert_close(run(model, x), apart)
    tg.detach(_unmerged(model))
    remembered.assert_same()


def test_a_layer_that_include_names_is_taken_where_no_target_takes_it() -> None:
    adapter = tg.attach(tiny("test_vit"), "lora", include=["patch_embed.proj", "blocks[0].attn.qkv"])
    assert {n.partition(".up")[0] for n in adapter.state_dict() if n.endswith("up")} == {
        "patch_embed.proj/delta", "blocks[0].attn.qkv/q", "blocks[0].attn.qkv/v",
    }  # fmt: skip


def test_targets_that_the_model_lacks_are_refused_with_those_it_could_have() -> None:
    with pytest.raises(tg.GraftError, match=r"^lora: no weight for targets conv is selected on Vision\w+; name"):
        tg.attach(tiny("test_vit"), "lora[targets=conv]")


# -- options ---------------------------------------------------------------------------------------------


def scales(adapter: tg.Adapter) -> set[float]:
    return {p.form.scale for _, p in adapter.placements}


def test_the_scale_is_alpha_over_the_rank_or_over_its_root() -> None:
    assert scales(tg.attach(tiny("test_vit"), "lora[rank=4, alpha=16]")) == {4.0}
    assert scales(tg.attach(tiny("test_vit"), "lora[rank=4, alpha=16, rslora=true]")) == {8.0}
    assert scales(tg.attach(tiny("test_convnext"), "lora[targets=conv, rank=4096, alpha=4096]")) == {1.0}


def test_patterns_give_single_modules_another_rank_and_scale() -> None:
    method = "lora[rank_pattern=[['blocks[-1]', 2]], alpha_pattern=[[blocks.0.*, 4]]]"
    adapter = tg.attach(tiny("test_vit"), method)
    found = {(p.home, p.form.up.shape[1], p.form.scale) for _, p in adapter.placements}
    last = len(adapter.sites) - 1
    assert (f"blocks.{last}.attn.qkv", 2, 4.0) in found
    assert ("blocks.0.attn.qkv", 8, 0.5) in found
    with pytest.raises(tg.GraftError, match="names no module"):
        tg.attach(tiny("test_vit"), LoRA(rank_pattern=(("nowhere", 2),)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank_pattern": (("blocks[0]", 0),)}, "rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": 0.1, "dora": True}, "no input to act on"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(tg.GraftError, match=said):
        LoRA(**options)


def test_dropout_acts_in_training_only_and_is_refused_where_there_is_no_input() -> None:
    adapter = disturb(tg.attach(tiny("test_vit"), "lora[dropout=0.5]"))
    model, x = adapter.model, images()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    with pytest.raises(tg.GraftError, match=r"lora: dropout=0\.5 .*conv_dw.*exclude="):
        tg.attach(tiny("test_convnext"), "lora[dropout=0.5]")
    block, tokens = EncoderBlock(2, 8, 16, 0.0, 0.0, nn.LayerNorm), torch.randn(2, 5, 8)
    with pytest.raises(tg.GraftError, match="its parent reads it"):
        tg.attach(block, "lora[dropout=0.5]", example=((tokens,), {}))


def test_dora_starts_with_the_norms_of_the_weight_and_merges() -> None:
    model = tiny("test_convnext")
    weights = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    adapter = tg.attach(model, "lora[dora=true]")
    for _, placement in adapter.placements:
        norms = weights[placement.home].flatten(1).norm(dim=1)
        torch.testing.assert_close(placement.form.magnitude.detach(), norms)
    disturb(adapter)
    apart = run(model, images())
    assert tg.merge(model).complete
    assert_close(run(model, images()), apart, 1e-4)
    for _, placement in adapter.placements:
        merged = model.get_submodule(placement.home)._parameters["weight"]
        torch.testing.assert_close(merged.flatten(1).norm(dim=1), placement.form.magnitude.abs(), rtol=1e-4, atol=1e-5)


def test_dora_is_refused_where_the_norm_of_the_weight_means_nothing() -> None:
    model = nn.Sequential(StdConv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2))
    for path, said in (("0", "standardised"), ("1", "transposed")):
        with pytest.raises(tg.GraftError, match=rf"^lora: dora=true cannot act at '{path}'.*{said}"):
            tg.attach(model, "lora[dora=true, targets=all]", include=path)


# -- peft ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_peft(kind: str, rslora: bool, dora: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    ours = Host(layer)
    theirs = Host(make())
    theirs.load_state_dict(ours.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], use_rslora=rslora, use_dora=dora)
    reference = peft.get_peft_model(theirs, config)
    method = LoRA(rank=3, alpha=5, targets="all", rslora=rslora, dora=dora)
    adapter = disturb(tg.attach(ours, method, include="layer", example=((x,), {})))
    form = adapter.placements[0][1].form
    held = reference.base_model.model.layer
    pairs = [(form.down, held.lora_A["default"].weight), (form.up, held.lora_B["default"].weight)]
    if dora:
        pairs.append((form.magnitude, held.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.view_as(other))
    assert_close(ours(x), reference(x))
    weight = torch.randn_like(ours(x))
    (ours(x) * weight).sum().backward()
    (reference(x) * weight).sum().backward()
    for mine, other in pairs:
        assert_close(mine.grad, other.grad.view_as(mine))


def test_depthwise_adapters_are_smaller_than_the_kernel_where_pefts_are_not() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1, groups=32)
    adapter = tg.attach(Host(conv), "lora[rank=32, targets=all]", include="layer")
    assert adapter.num_parameters() == 9 * (32 + 9)
    assert all(p.form.up.shape[1] == 9 for _, p in adapter.placements)
    assert isinstance(adapter.placements[0][1], WeightDelta)


def test_the_start_of_a_is_kaiming_uniform_and_b_is_zero() -> None:
    torch.manual_seed(0)
    adapter = tg.attach(timm.create_model("vit_tiny_patch16_224", depth=1), "lora")
    form = adapter.placements[0][1].form
    assert not form.up.any()
    assert 0.9 / math.sqrt(192) < form.down.abs().max() <= 1 / math.sqrt(192)


def test_a_step_of_training_lowers_the_loss_of_that_batch() -> None:
    adapter = tg.attach(tiny("test_vit"), "lora", num_classes=4)
    before = adapter.model(images()).square().mean()
    train_step(adapter, lr=1e-2)
    assert adapter.model(images()).square().mean() < before
