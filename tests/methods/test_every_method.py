"""What every registered method promises on every backbone that it supports."""

from __future__ import annotations

import sys

import pytest
import torch

import torchgraft as tg

from .. import traits
from .networks import TINY, images, tiny, train_step

COMBINATIONS = [(method, backbone) for method in tg.methods() for backbone in TINY]
VARIANTS: dict[str, list[str]] = traits.of("variants")
"""Options under which the promises are checked too."""
SMALL: dict[str, str] = traits.of("spec")
"""Methods whose defaults do not fit an image of the tests' size."""


def supported(method: str, backbone: str, **options: object) -> tg.Adapter:
    """The attached method; the test is skipped where the method refuses the backbone with a reason."""
    spec = SMALL.get(method, method)
    try:
        return tg.attach(tiny(backbone), spec, **options)  # type: ignore[arg-type]
    except tg.GraftError as error:
        assert str(error).startswith(f"{tg.method(spec).name}:")
        pytest.skip(str(error))


def frozen(adapter: tg.Adapter) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the adapted model that the adapter does not own."""
    owned = {t.data_ptr() for t in adapter.state_dict().values()}
    return {n: t for n, t in adapter.model.state_dict(keep_vars=True).items() if t.data_ptr() not in owned}


WITH_VARIANTS = [
    (variant, backbone) for method, backbone in COMBINATIONS for variant in (method, *VARIANTS.get(method, ()))
]


@pytest.mark.parametrize(("method", "backbone"), WITH_VARIANTS)
def test_a_training_step_changes_nothing_but_what_the_adapter_owns(method: str, backbone: str) -> None:
    adapter = supported(method, backbone, num_classes=5)
    rest = frozen(adapter)
    assert len(rest) >= len(tiny(backbone).state_dict())
    before = {name: t.detach().clone() for name, t in rest.items()}
    own = {name: t.clone() for name, t in adapter.state_dict().items()}
    train_step(adapter)
    assert [n for n, t in rest.items() if not torch.equal(t, before[n])] == []
    assert any(not torch.equal(t, own[n]) for n, t in adapter.state_dict().items())


@pytest.mark.parametrize(("method", "backbone"), WITH_VARIANTS)
def test_the_gradient_reaches_every_trainable_tensor(method: str, backbone: str) -> None:
    adapter = supported(method, backbone, num_classes=5)
    train_step(adapter, lr=1e-2)  # zero starts let the gradient through from the second step on
    adapter.model.train()
    adapter.model.zero_grad()
    adapter.model(images()).square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert not any(t.requires_grad for t in frozen(adapter).values())


@pytest.mark.parametrize(("method", "backbone"), WITH_VARIANTS)
def test_training_changes_what_the_backbone_computes(method: str, backbone: str) -> None:
    # Without a head of its own: a method that adds nothing cannot hide behind one.
    adapter = supported(method, backbone)
    before = adapter.model(images())
    train_step(adapter)
    assert not torch.equal(adapter.model(images()), before)


@pytest.mark.parametrize(("method", "backbone"), WITH_VARIANTS)
def test_the_start_is_the_pretrained_network_unless_the_method_says_otherwise(method: str, backbone: str) -> None:
    adapter = supported(method, backbone)
    config = tg.method(method)
    said = sys.modules[type(config).__module__].__doc__ or ""
    moved = "so not the pretrained network" in " ".join(said.split()) or getattr(config, "preset", None) == "official"
    start = adapter.model(images())
    tg.detach(adapter.model)
    plain = adapter.model(images())
    assert torch.equal(plain, tiny(backbone)(images()))
    assert torch.allclose(start, plain, rtol=1e-4, atol=1e-5) != moved


@pytest.mark.parametrize(("method", "backbone"), COMBINATIONS)
def test_a_state_loads_into_a_fresh_copy_and_gives_the_same_bits(method: str, backbone: str) -> None:
    adapter = supported(method, backbone, num_classes=5)
    train_step(adapter)
    other = supported(method, backbone, num_classes=5)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.model(images()), adapter.model(images()))


@pytest.mark.parametrize(("method", "backbone"), COMBINATIONS)
def test_merging_changes_no_output_and_is_undone_to_the_bit(method: str, backbone: str) -> None:
    adapter = supported(method, backbone)
    train_step(adapter, lr=1e-2)
    weights = {n: t.clone() for n, t in adapter.model.state_dict().items()}
    apart = adapter.model(images())
    tg.merge(adapter.model)
    torch.testing.assert_close(adapter.model(images()), apart, rtol=2e-4, atol=2e-4)
    tg.unmerge(adapter.model)
    assert torch.equal(adapter.model(images()), apart)
    assert [n for n, t in adapter.model.state_dict().items() if not torch.equal(t, weights[n])] == []


@pytest.mark.parametrize(("method", "backbone"), COMBINATIONS)
def test_rows_routed_through_two_adapters_come_out_as_if_run_apart(method: str, backbone: str) -> None:
    first = supported(method, backbone, num_classes=5, name="first")
    model = first.model
    train_step(first)
    second = tg.attach(model, SMALL.get(method, method), num_classes=5, name="second")
    train_step(second)
    names = ["second", "first", "second"]
    x = images(3)
    apart = []
    for i, name in enumerate(names):
        tg.activate(model, name)
        apart.append(model(x[i : i + 1]))
    with tg.route(model, names):
        torch.testing.assert_close(model(x), torch.cat(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", tg.methods())
def test_an_adapter_folder_gives_the_same_bits_back(method: str, tmp_path) -> None:
    adapter = supported(method, "test_resnet", num_classes=5)
    train_step(adapter)
    adapter.save(tmp_path / "adapter")
    loaded = tg.load(tiny("test_resnet"), tmp_path / "adapter")
    assert loaded.method == adapter.method
    assert torch.equal(loaded.model(images()), adapter.model(images()))


@pytest.mark.parametrize("method", tg.methods())
def test_a_plan_counts_what_attaching_makes_trainable(method: str) -> None:
    adapter = supported(method, "test_resnet", num_classes=5)
    trainable = sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)
    plan = tg.plan(tiny("test_resnet"), SMALL.get(method, method), num_classes=5)
    assert plan.parameters + plan.head_parameters == trainable == sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize("method", [*tg.methods(), *(v for variants in VARIANTS.values() for v in variants)])
def test_a_config_is_read_back_from_its_string_form(method: str) -> None:
    config = tg.method(method)
    assert tg.method(str(config)) == config
    assert type(config).from_dict(config.to_dict()) == config


@pytest.mark.parametrize("method", tg.methods())
def test_every_method_supports_some_backbone_of_these_tests(method: str) -> None:
    assert any(_attaches(method, backbone) for backbone in TINY)


def _attaches(method: str, backbone: str) -> bool:
    try:
        tg.attach(tiny(backbone), SMALL.get(method, method))
    except tg.GraftError:
        return False
    return True
