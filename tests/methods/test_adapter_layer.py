"""The bottleneck that all adapters share, and where it stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

import torchgraft as tg
from torchgraft.core.anatomy import Anatomy
from torchgraft.methods.forms.adapter_layer import AdapterLayer
from torchgraft.methods.forms.branch_adapters import adapted_branches

from .documented import table
from .networks import count, tiny
from .watching import spread


@pytest.mark.parametrize("row", table("adapters.md", "| model |"), ids=lambda row: row["model"])
def test_adapters_have_the_documented_size(row: dict[str, str]) -> None:
    wanted = {method: cell for method, cell in row.items() if method != "model"}
    assert {method: f"{count(row['model'], method):,}" for method in wanted} == wanted


@pytest.mark.parametrize(("side", "extra"), [("none", 0), ("in", 16), ("out", 16)])
def test_a_layer_is_down_activation_up_with_a_norm_on_either_side(side: str, extra: int) -> None:
    layer = spread(AdapterLayer(8, 3, layer_norm=side, scale=2.0))  # type: ignore[arg-type]
    x = torch.randn(2, 5, 8)
    z = F.layer_norm(x, (8,), layer.norm.weight, layer.norm.bias) if side == "in" else x
    y = 2 * (F.relu(z @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T + layer.up.bias)
    y = F.layer_norm(y, (8,), layer.norm.weight, layer.norm.bias) if side == "out" else y
    torch.testing.assert_close(layer(x), y)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 8 * 3 + 3 + 8 + extra


def test_a_layer_works_on_the_axis_that_it_is_told() -> None:
    layer = spread(AdapterLayer(8, 3, axis=1, layer_norm="in"))
    x = torch.randn(2, 8, 4, 5)
    found = layer(x)
    layer.axis = -1
    torch.testing.assert_close(found, layer(x.movedim(1, -1)).movedim(-1, 1))


def test_the_lora_start_is_zero_and_lets_the_gradient_in_and_the_bert_start_is_small() -> None:
    x = torch.randn(2, 5, 64)
    zero = AdapterLayer(64, 16, init="lora")
    assert not zero(x).any()
    zero(x).sum().backward()
    assert zero.up.weight.grad.any()
    small = AdapterLayer(64, 16, init="bert")
    assert small.down.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert small.up.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not small.up.bias.any()


def test_a_learned_scale_is_one_number_that_starts_at_one() -> None:
    layer = AdapterLayer(8, 3, scale="learned", bias=False)
    assert dict(layer.named_parameters())["scale"] == 1
    assert sum(p.numel() for p in layer.parameters()) == 2 * 8 * 3 + 1


def test_dropout_acts_in_training_alone() -> None:
    layer = spread(AdapterLayer(8, 64, dropout=0.5))
    x = torch.randn(2, 5, 8)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_cross_attention_counts_as_attention() -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30)
    found = adapted_branches(Anatomy(transformers.T5ForConditionalGeneration(config)), "houlsby", ["attn"])
    assert [b.kind for b in found] == ["attn", "attn", "cross"]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [("houlsby", "attention or MLP"), ("pfeiffer", "MLP"), ("compacter", "MLP"), ("adaptformer", "MLP"),
     ("parallel-adapter", "MLP"), ("scaled-parallel-adapter", "MLP")],
)  # fmt: skip
def test_a_network_without_sub_layers_is_refused_with_the_reason(method: str, wanted: str) -> None:
    text = f"{method}: no block of ResNet that is selected has {wanted} sub-layers with a residual sum"
    with pytest.raises(tg.GraftError, match=text):
        tg.attach(tiny("test_resnet"), method)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel-adapter", "compacter"])
def test_options_without_sense_are_refused(method: str) -> None:
    with pytest.raises(tg.GraftError, match=f"{method}: width=0 is not valid; expected a whole number of at least 1"):
        tg.method(f"{method}[width=0]")
    with pytest.raises(tg.GraftError, match=f"{method}: act='gleu'; did you mean 'gelu'"):
        tg.method(f"{method}[act=gleu]")


def test_sites_that_are_none_are_refused_in_a_config_too() -> None:
    with pytest.raises(tg.GraftError, match="houlsby: sites='mlp' is not valid; expected a list of attn, mlp or both"):
        tg.methods.Houlsby(sites="mlp")  # type: ignore[arg-type]
