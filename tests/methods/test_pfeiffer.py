"""Pfeiffer adapters: behind the MLP, on its output or on the residual sum."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers

import torchgraft as tg
from torchgraft.methods import Pfeiffer

from .networks import SIDE, count, images, tiny, train_step
from .watching import record, spread


@pytest.mark.parametrize("reads", ["output", "sum"])
def test_pfeiffer_adapters_have_the_published_size(reads: str) -> None:
    assert count("vit_base_patch16_224", f"pfeiffer[reads={reads}]") == 156_768


def test_the_adapter_of_the_output_changes_what_fc2_returns() -> None:
    model = tiny("test_vit")
    returned = record(model, "blocks.0.mlp", "output")
    model(images())
    adapter = tg.attach(model, Pfeiffer(), include="blocks.0")
    form = spread(adapter.placements[0][1].form)
    model(images())
    torch.testing.assert_close(returned[-1], returned[0] + form(returned[0]))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "swin"])
def test_the_adapter_of_the_sum_follows_a_pre_norm_block(name: str) -> None:
    model = tiny(name)
    path = {"test_vit": "blocks.0", "test_convnext": "stages.0.blocks.0", "swin": "layers.0.blocks.0"}[name]
    block = record(model, path, "output")
    model(images())
    adapter = tg.attach(model, Pfeiffer(reads="sum"), include=path)
    form = spread(adapter.placements[0][1].form)
    model(images())
    torch.testing.assert_close(block[-1], block[0] + form(block[0]))


def test_the_adapter_of_the_sum_uses_the_norm_of_a_post_norm_block_twice() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30
    )
    model = transformers.BertModel(config).eval()
    path = "encoder.layer.1.output.LayerNorm"
    total, out = record(model, path, "input"), record(model, path, "output")
    ids = torch.randint(1, 30, (2, 8))
    model(ids)
    adapter = tg.attach(model, Pfeiffer(reads="sum"), include="encoder.layer.1")
    (_, placement), *_ = adapter.placements
    assert placement.home == path
    form, norm = spread(placement.form), model.get_submodule(path)
    model(ids)

    def frozen(h: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(h, (16,), norm.weight, norm.bias, norm.eps)

    torch.testing.assert_close(out[-1], frozen(total[0] + form(frozen(total[0]))))


def test_the_sum_of_a_part_of_a_block_is_found_where_the_block_has_several() -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30)
    adapter = tg.attach(transformers.T5ForConditionalGeneration(config), Pfeiffer(reads="sum"))
    assert [p.home for _, p in adapter.placements] == ["encoder.block.0.layer.1", "decoder.block.0.layer.2"]
    maxvit = timm.create_model("test_maxvit", img_size=64, num_classes=3)
    homes = [p.home for _, p in tg.attach(maxvit, Pfeiffer(reads="sum")).placements]
    assert homes[:2] == ["stages.0.blocks.0.attn_block", "stages.0.blocks.0.attn_grid"]


def test_the_adapter_of_the_sum_trains_on_blocks_with_the_norm_inside_the_branch() -> None:
    model = timm.create_model(
        "swinv2_tiny_window8_256", img_size=SIDE, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4,
        num_classes=3,
    )  # fmt: skip
    adapter = tg.attach(model, Pfeiffer(reads="sum"))
    assert [p.home for _, p in adapter.placements] == ["layers.0.blocks.0", "layers.1.blocks.0"]
    train_step(adapter)
