"""Prefix tuning: its counts, its kinds of attention, and the net that is dropped after training."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import transformers as hf
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.tiny_vit import TinyVit

import torchgraft as tg
from torchgraft.core.placements import KeyValue
from torchgraft.methods.prefix import finalise

from ..properties.families import FAMILIES, network, run
from .networks import count, images, tiny, train_step


@functools.cache
def bart_large() -> tg.Anatomy:
    with torch.device("meta"):
        return tg.anatomy(
            hf.BartModel(
                hf.BartConfig(
                    d_model=1024,
                    encoder_layers=12,
                    decoder_layers=12,
                    encoder_attention_heads=16,
                    decoder_attention_heads=16,
                    encoder_ffn_dim=4096,
                    decoder_ffn_dim=4096,
                    attn_implementation="eager",  # the other one looks at values of the mask, which meta tensors lack
                )
            )
        )


def values(spec: str, where: tg.Anatomy) -> int:
    with torch.device("meta"):
        placed = tg.method(spec).placements(where)
    return sum({id(p): p.numel() for q in placed for p in q.parameters()}.values())


def test_counts_are_those_of_the_specification() -> None:
    assert count("vit_base_patch16_224", "prefix[length=16]") == 294_912
    assert count("vit_base_patch16_224", "prefix") == 552_960
    assert values("prefix[length=200]", bart_large()) == 14_745_600


def test_the_net_has_the_published_size_while_it_is_trained() -> None:
    assert count("vit_base_patch16_224", "prefix[length=16, reparametrise=true]") == 15_391_520


def test_self_attention_of_encoder_and_decoder_and_cross_attention_have_a_net_each() -> None:
    with torch.device("meta"):
        placed = tg.method("prefix[reparametrise=true]").placements(bart_large())
    nets: dict[int, set[str]] = {}
    for placement in placed:
        parts = placement.home.split(".")
        nets.setdefault(id(placement.form.net), set()).add(f"{parts[0]} {parts[-1]}")
    assert sorted(map(sorted, nets.values())) == [
        ["decoder encoder_attn"],
        ["decoder self_attn"],
        ["encoder self_attn"],
    ]
    assert len(placed) == 36


def test_attentions_of_several_widths_share_a_net_and_get_keys_of_their_own_width() -> None:
    model = tiny("swin")
    adapter = tg.attach(model, "prefix[length=2, reparametrise=true, mid=4]")
    widths = [tuple(t.shape for t in p.form()) for _, p in adapter.placements]
    assert widths == [((2, 8), (2, 8))] + 3 * [((2, 16), (2, 16))]
    assert len({id(p.form.net) for _, p in adapter.placements}) == 1


def test_finalising_drops_the_net_and_changes_no_output(tmp_path: Path) -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, "prefix[length=4, reparametrise=true, mid=8]", num_classes=5)
    train_step(adapter)
    before = model(images())
    finalise(adapter)
    torch.testing.assert_close(model(images()), before, rtol=1e-5, atol=1e-6)
    kept = [p for _, p in adapter.placements if isinstance(p, KeyValue)]
    assert adapter.num_parameters() == sum(4 * (p.form.keys.shape[1] + p.form.values.shape[1]) for p in kept)
    assert adapter.method == tg.method("prefix[length=4, mid=8]")
    adapter.save(tmp_path / "adapter")
    loaded = tg.load(tiny("test_vit"), tmp_path / "adapter")
    assert torch.equal(loaded.model(images()), model(images()))
    assert all(p.requires_grad for p in loaded.parameters())


def test_finalising_reaches_the_parts_of_a_combination_and_leaves_others_alone() -> None:
    adapter = tg.attach(tiny("test_vit"), "lora + mam[length=2, width=2, reparametrise=true, mid=4]")
    finalise(adapter)
    assert str(adapter.method) == "lora + mam[length=2, width=2, mid=4]"
    assert not any(".net." in name for name, _ in adapter.named_parameters())
    plain = tg.attach(tiny("test_vit"), "bitfit")
    finalise(plain)
    assert plain.method == tg.method("bitfit")


def test_without_the_gate_the_two_softmaxes_are_added() -> None:
    model = tiny("test_vit")
    gated = tg.attach(model, "prefix[length=4]", name="gated")
    apart = tg.attach(model, "prefix[length=4, gated=false]", name="apart")
    apart.load_state_dict(gated.state_dict())
    outs = []
    for name in ("gated", "apart"):
        tg.activate(model, name)
        outs.append(model(images()))
    assert not torch.allclose(*outs, rtol=1e-3, atol=1e-3)
    with torch.no_grad():  # values of zero add nothing, but still take their share of one softmax
        for _, placement in apart.placements:
            placement.form.values.zero_()
    tg.activate(model, None)
    plain = model(images())
    tg.activate(model, "apart")
    torch.testing.assert_close(model(images()), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["hf_t5", "hf_bert", "torchvision_swin"])
def test_a_selection_names_blocks_or_single_attentions(family: str) -> None:
    sites = [p.home for p in tg.method("prefix").placements(tg.anatomy(network(family)))]
    model = network(family)
    adapter = tg.attach(model, "prefix[length=2]", include=sites[0].removesuffix(".self"))
    assert [p.home for _, p in adapter.placements] == sites[:1]
    assert run(model, FAMILIES[family].batch()).isfinite().all()


def test_a_model_without_attention_and_one_with_a_softmax_of_its_own_are_refused() -> None:
    with pytest.raises(tg.GraftError, match=r"^prefix: no attention of ResNet is selected"):
        tg.attach(tiny("test_resnet"), "prefix")
    with pytest.raises(tg.GraftError, match=r"^prefix: attention 'layers.0.blocks.0.attn' cannot take further keys"):
        small = SwinTransformerV2(img_size=32, patch_size=4, embed_dim=8, depths=(1,), num_heads=(1,), window_size=4)
        tg.attach(small, "prefix")


@pytest.mark.parametrize("field", ["length", "mid"])
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(tg.GraftError, match=rf"^prefix: {field}=0 is not valid; expected at least 1"):
        tg.method(f"prefix[{field}=0]")


def test_an_attention_that_names_the_widths_of_its_keys_and_values_gets_rows_of_these() -> None:
    model = TinyVit(
        num_classes=3, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), window_sizes=(4, 4, 2, 1)
    ).eval()
    adapter = tg.attach(model, "prefix[length=2]")
    for _, placement in adapter.placements:
        attention = placement.host[0]
        assert placement.form.keys.shape == (2, attention.num_heads * attention.key_dim)
        assert placement.form.values.shape == (2, attention.num_heads * attention.val_dim)
    assert model(images()).isfinite().all()
