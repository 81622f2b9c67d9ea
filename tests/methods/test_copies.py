"""Methods that train existing parameters own copies of them: full, linear, norm-tuning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg

from .networks import images, tiny, train_step


class Tied(nn.Module):
    """Two linear layers with one weight, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.enter = nn.Linear(6, 6)
        self.leave = nn.Linear(6, 6)
        self.leave.weight = self.enter.weight
        self.unused = nn.ModuleList([nn.Sequential(nn.Linear(6, 6))])

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x * self.scale).relu())


def test_full_trains_every_parameter_that_runs_and_the_model_keeps_its_own() -> None:
    model = Tied()
    adapter = tg.attach(model, tg.Full())
    names = set(adapter.state_dict())
    assert names == {"/trained.scale", "enter/trained.weight", "enter/trained.bias", "leave/trained.bias"}
    assert adapter.num_parameters() == 6 + 36 + 6 + 6


def test_a_shared_weight_keeps_one_copy_that_both_layers_read() -> None:
    model = Tied()
    adapter = tg.attach(model, tg.Full())
    x = torch.randn(4, 6)
    model(x).square().mean().backward()
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    assert model.enter.weight is model.leave.weight
    with torch.no_grad():
        expected = nn.functional.linear(
            nn.functional.linear(x * model.scale, model.enter.weight, model.enter.bias).relu(),
            model.enter.weight,
            model.leave.bias,
        )
        assert torch.equal(model(x), expected)


def test_full_with_a_head_of_its_own_leaves_the_classifier_alone() -> None:
    adapter = tg.attach(tiny("test_convnext"), tg.Full(), num_classes=7)
    assert not any(key.startswith("head.fc") for key in adapter.state_dict())
    backbone = sum(p.numel() for p in tiny("test_convnext", num_classes=0).parameters())
    assert adapter.num_parameters() == backbone
    assert adapter.head_parameters() == sum(p.numel() for p in adapter.head.parameters())


def test_include_narrows_full_to_a_part_of_the_network() -> None:
    adapter = tg.attach(tiny("test_resnet"), tg.Full(), include="layer4")
    assert adapter.sites and all(s.path.startswith("layer4.") for s in adapter.sites)


def test_two_adapters_train_apart_from_each_other() -> None:
    model = tiny("test_resnet")
    plain = model(images())
    first = tg.attach(model, tg.Full(), name="first")
    train_step(first)
    trained = model(images())
    second = tg.attach(model, tg.Full(), name="second")
    assert torch.equal(model(images()), plain)
    train_step(second)
    tg.activate(model, "first")
    assert torch.equal(model(images()), trained)


def test_linear_without_classes_trains_a_copy_of_the_classifier_alone() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, tg.Linear())
    assert set(adapter.state_dict()) == {"head/trained.weight", "head/trained.bias"}


def test_linear_with_classes_is_the_new_head_alone() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, tg.Linear(), num_classes=7)
    assert adapter.num_parameters() == 0
    assert set(adapter.state_dict()) == {"head.weight", "head.bias"}
    assert model(images()).shape == (2, 7)


def test_linear_without_classes_or_classifier_has_nothing_to_train() -> None:
    with pytest.raises(tg.GraftError, match=r"linear adds nothing to this model.*num_classes"):
        tg.attach(tiny("test_vit", num_classes=0), tg.Linear())


@pytest.mark.parametrize(
    ("backbone", "trained"),
    [
        ("test_vit", {"norm/trained.weight", "norm/trained.bias"}),
        ("test_convnext", {"head.norm/trained.weight", "head.norm/trained.bias"}),
        ("test_efficientnet", set()),
    ],
)
def test_the_published_linear_probe_also_trains_a_final_layernorm(backbone: str, trained: set[str]) -> None:
    adapter = tg.attach(tiny(backbone), tg.Linear(norm=True), num_classes=7)
    assert {key for key in adapter.state_dict() if not key.startswith(("head.weight", "head.bias"))} == trained


def test_the_published_linear_probe_puts_a_new_batchnorm_behind_a_resnet() -> None:
    adapter = tg.attach(tiny("test_resnet"), tg.Linear(norm=True), num_classes=7)
    keys = {key for key in adapter.state_dict() if not key.startswith("head.")}
    stats = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert keys == {f"stages[3]/norm.{name}" for name in stats}
    assert adapter.num_parameters() == 2 * adapter.head.in_features


def test_norm_tuning_on_a_network_without_norms_says_so() -> None:
    with pytest.raises(tg.GraftError, match=r"norm-tuning: no BatchNorm, LayerNorm or GroupNorm.*Tied"):
        tg.attach(Tied(), tg.NormTuning())


def test_norm_tuning_trains_scales_and_shifts_and_no_statistics() -> None:
    model = tiny("test_efficientnet")
    adapter = tg.attach(model, tg.NormTuning())
    assert {key.rpartition(".")[2] for key in adapter.state_dict()} == {"weight", "bias"}
    assert all(s.kind == "batchnorm" for s in adapter.sites)
    assert len(adapter.sites) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
