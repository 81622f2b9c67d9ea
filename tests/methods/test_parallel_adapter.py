"""Parallel and scaled parallel adapters: what they read, where they add, and their scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers

import torchgraft as tg
from torchgraft.methods import ParallelAdapter, ScaledParallelAdapter

from .networks import count, images, tiny
from .watching import record, spread


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("parallel-adapter", 156_768),
        ("scaled-parallel-adapter", 304_320),
        ("scaled-parallel-adapter[scale=learned]", 304_320 + 12),
        ("parallel-adapter[sites=[attn]]", 156_768 + 12 * 2 * 768),
    ],
)
def test_parallel_adapters_have_the_published_size(method: str, size: int) -> None:
    assert count("vit_base_patch16_224", method) == size


@pytest.mark.parametrize(("adapter_input", "side"), [("pre_norm", "input"), ("post_norm", "output")])
def test_the_adapter_of_the_mlp_is_scaled_and_added_to_what_the_mlp_adds(adapter_input: str, side: str) -> None:
    model = tiny("test_vit")
    x = record(model, "blocks.0.norm2", side)  # type: ignore[arg-type]
    block = record(model, "blocks.0", "output")
    model(images())
    method = ScaledParallelAdapter(width=4, adapter_input=adapter_input)  # type: ignore[arg-type]
    adapter = tg.attach(model, method, include="blocks.0")
    form = spread(adapter.placements[0][1].form)
    model(images())
    bottleneck = form.up(torch.relu(form.down(x[0])))
    torch.testing.assert_close(block[-1] - block[0], 4 * bottleneck, rtol=1e-4, atol=1e-4)


def test_in_post_norm_blocks_both_inputs_are_the_stream() -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(1, 30, (2, 8))
    read = record(model, "encoder.layer.0.intermediate.dense", "input")
    total = record(model, "encoder.layer.0.output.LayerNorm", "input")
    model(ids)
    for adapter_input in ("pre_norm", "post_norm"):
        adapter = tg.attach(model, ParallelAdapter(adapter_input=adapter_input))  # type: ignore[arg-type]
        form = spread(adapter.placements[0][1].form)
        model(ids)
        torch.testing.assert_close(total[-1], total[0] + form(read[0]))
        tg.detach(model)


@pytest.mark.parametrize(("name", "attention"), [("test_vit", "blocks.0.attn"), ("swin", "layers.0.blocks.0.attn")])
def test_the_adapter_of_attention_is_added_to_the_heads(name: str, attention: str) -> None:
    model = tiny(name)
    x, out = record(model, attention, "input"), record(model, f"{attention}.proj", "output")
    model(images())
    method = ParallelAdapter(width=4, sites=("attn",), scale="learned")
    adapter = tg.attach(model, method, include=attention.removesuffix(".attn"))
    form = spread(adapter.placements[0][1].form)
    model(images())
    proj = model.get_submodule(f"{attention}.proj")
    torch.testing.assert_close(out[-1], out[0] + F.linear(form(x[0]), proj.weight))
    assert dict(adapter.named_parameters())[f"{adapter.placements[0][0]}.scale"].shape == ()


def test_heads_that_are_wider_than_the_stream_are_adapted_at_their_width() -> None:
    config = transformers.T5Config(d_model=16, d_kv=12, d_ff=32, num_layers=1, num_heads=2, vocab_size=30)
    model = transformers.T5ForConditionalGeneration(config)
    adapter = tg.attach(model, ParallelAdapter(sites=("attn",)))
    assert {(p.form.down.in_features, p.form.up.out_features) for _, p in adapter.placements} == {(16, 24)}


def test_attention_whose_output_projection_is_never_called_is_refused_for_its_heads_alone() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3)
    with pytest.raises(tg.GraftError, match=r"parallel-adapter: attention .* never calls its output projection"):
        tg.attach(model, ParallelAdapter(sites=("attn", "mlp")))
    assert tg.attach(model, ParallelAdapter()).num_parameters() > 0
