"""Multi-head parallel adapter: counts, its two queries, and what it is on every head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchgraft as tg

from ..properties.families import FAMILIES, network, run
from .networks import count, images, tiny, train_step


def test_it_has_as_many_parameters_as_a_prefix() -> None:
    assert count("vit_base_patch16_224", "multihead-adapter") == 294_912
    assert count("vit_base_patch16_224", "multihead-adapter[length=30]") == 552_960


def test_it_adds_a_bottleneck_to_every_head_in_front_of_the_output_projection() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, "multihead-adapter[length=3, init=official]", include="blocks.0")
    placement = adapter.placements[0][1]
    seen: dict[str, torch.Tensor] = {}
    attention: nn.Module = model.blocks[0].attn
    attention.qkv.register_forward_hook(lambda m, a, out: seen.update(qkv=out))
    attention.proj.register_forward_pre_hook(lambda m, args: seen.update(heads=args[0]))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
        model(images())
        changed, q = seen["heads"], seen["qkv"].chunk(3, -1)[0]
        tg.activate(model, None)
        model(images())
    size = q.shape[-1] // attention.num_heads
    for h in range(attention.num_heads):
        own = slice(h * size, (h + 1) * size)
        scores = q[..., own] @ placement.form.keys[:, own].T / size**0.5
        wanted = seen["heads"][..., own] + scores.relu() @ placement.form.values[:, own]
        torch.testing.assert_close(changed[..., own], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["hf_bert", "hf_vit", "hf_t5", "eva02"])
def test_the_released_form_reads_a_norm_of_its_own_where_queries_have_a_layer(family: str) -> None:
    model = network(family)
    before = run(model, FAMILIES[family].batch())
    adapter = tg.attach(model, "multihead-adapter[length=3, norm=true]")
    assert torch.equal(run(model, FAMILIES[family].batch()), before)
    train_step_on = {n for n, _ in adapter.named_parameters()}
    assert any(n.endswith("norm.weight") for n in train_step_on)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    assert not torch.allclose(run(model, FAMILIES[family].batch()), before, rtol=1e-3, atol=1e-3)
    assert not any(n.endswith("query.weight") for n in train_step_on)


def test_the_released_form_is_refused_where_queries_keys_and_values_are_one_layer() -> None:
    with pytest.raises(
        tg.GraftError, match=r"^multihead-adapter: norm=true needs a query layer of its own in 'blocks.0"
    ):
        tg.attach(tiny("test_vit"), "multihead-adapter[norm=true]")


def test_every_tensor_learns_from_the_second_step_on() -> None:
    adapter = tg.attach(tiny("test_vit"), "multihead-adapter[length=4]", num_classes=5)
    train_step(adapter)
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    train_step(adapter)
    assert [n for n, p in adapter.named_parameters() if torch.equal(p, start[n])] == []


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(tg.GraftError, match=r"^multihead-adapter: length=0 is not valid"):
        tg.method("multihead-adapter[length=0]")
