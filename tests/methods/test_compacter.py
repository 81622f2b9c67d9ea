"""Compacter: sums of Kronecker products with one rule for all layers."""

from __future__ import annotations

import pytest
import torch

import torchgraft as tg
from torchgraft.methods import Compacter
from torchgraft.methods.compacter import HypercomplexLinear, Rule

from .networks import count, images, tiny, train_step
from .watching import spread


def test_compacter_has_the_published_size_without_its_rule_and_64_more_with_it() -> None:
    assert count("vit_base_patch16_224", "compacter[train_rule=false]") == 48_384
    assert count("vit_base_patch16_224", "compacter") == 48_384 + 4**3


@pytest.mark.parametrize("rank", [1, 3])
def test_a_layer_equals_the_sum_of_its_kronecker_products(rank: int) -> None:
    layer = spread(HypercomplexLinear(12, 8, Rule(4), rank=rank))
    kernel = sum(torch.kron(a, u @ v) for a, u, v in zip(layer.rule.weight, layer.u, layer.v, strict=True))
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), x @ kernel + layer.bias)


def test_a_fresh_layer_keeps_the_size_of_what_it_reads() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    sizes = [HypercomplexLinear(256, 256, Rule(4))(x).std().item() for _ in range(20)]
    assert 0.5 < sum(sizes) / len(sizes) < 2


def test_every_layer_has_the_same_rule_and_the_file_holds_it_once() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, Compacter(width=8))
    rules = {id(form.rule.weight) for _, p in adapter.placements for form in (p.form.down, p.form.up)}
    assert len(rules) == 1
    assert [name for name in adapter.state_dict() if "rule" in name] == [f"{adapter.placements[0][0]}.down.rule.weight"]
    before = adapter.placements[0][1].form.down.rule.weight.clone()
    train_step(adapter)
    train_step(adapter)
    assert not torch.equal(adapter.placements[-1][1].form.up.rule.weight, before)


def test_a_rule_that_does_not_train_is_saved_with_the_adapter(tmp_path) -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, Compacter(width=8, train_rule=False))
    assert not any("rule" in name for name, _ in adapter.named_parameters())
    before = adapter.placements[0][1].form.down.rule.weight.clone()
    train_step(adapter)
    assert torch.equal(adapter.placements[0][1].form.down.rule.weight, before)
    adapter.save(tmp_path / "adapter")
    other = tiny("test_vit")
    tg.load(other, tmp_path / "adapter")
    assert torch.equal(other(images()), model(images()))


def test_the_rule_stays_shared_when_the_model_changes_its_precision() -> None:
    adapter = tg.attach(tiny("test_vit"), Compacter(width=8, train_rule=False))
    adapter.model.double()
    rules = {id(form.rule.weight) for _, p in adapter.placements for form in (p.form.down, p.form.up)}
    assert len(rules) == 1
    assert adapter.placements[0][1].form.up.rule.weight.dtype == torch.float64


def test_a_number_of_products_that_does_not_divide_the_widths_is_refused_with_those_that_do() -> None:
    with pytest.raises(tg.GraftError, match="compacter: phm_dim=5 does not divide width=64; expected a multiple of it"):
        Compacter(phm_dim=5)
    with pytest.raises(tg.GraftError, match="which phm_dim=16 does not divide; use one of 1, 2, 4, 8"):
        tg.attach(tiny("swin"), Compacter(phm_dim=16))
