"""Several adapters on one backbone: switching, names, removing, classifiers, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import torchgraft as tg
from torchgraft.core.graft import existing_point
from torchgraft.core.placements import Affine, Point, Sequential

from .attaching import Remembered, assert_every_tensor_learns, attach, disturb, run

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _resnet(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4, **options).eval()


def _toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()


T = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def _affine(path: str) -> Callable[[tg.Anatomy], Affine]:
    return lambda _: Affine(path, nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4)), axis=-1)


# -- switching ------------------------------------------------------------------------------------------


def test_each_adapter_gives_its_own_output_whatever_was_active_before() -> None:
    model = _resnet()
    alone = {}
    for seed, (name, method, classes) in enumerate(
        [("cars", "conv-adapter", 3), ("pets", "bitfit", 5), ("food", "conv-adapter[reduction=8]", None)]
    ):
        single = _resnet()
        torch.manual_seed(seed)
        disturb(tg.attach(single, method, name=name, num_classes=classes), 0.1, seed)
        alone[name] = run(single, X)
        torch.manual_seed(seed)
        disturb(tg.attach(model, method, name=name, num_classes=classes), 0.1, seed)
        assert tg.active(model) == name
    plain = run(_resnet(), X)
    for name in ("cars", "food", "pets", None, "pets", "cars", None, "food"):
        tg.activate(model, name)
        assert tg.active(model) == name
        assert torch.equal(run(model, X), plain if name is None else alone[name])


def test_only_the_active_adapter_learns() -> None:
    model = _toy()
    one = disturb(attach(model, _affine("0"), T, name="one"))
    two = disturb(attach(model, _affine("2"), T, name="two"))
    tg.activate(model, "one")
    kept = [p.clone() for p in two.parameters()]
    optimiser = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(T).square().sum().backward()
        optimiser.step()
    assert all(p.grad is None and torch.equal(p, k) for p, k in zip(two.parameters(), kept, strict=True))
    tg.activate(model, "two")
    assert_every_tensor_learns(two, T)


def test_switching_in_the_middle_of_training_keeps_the_modes() -> None:
    model = _resnet()
    tg.attach(model, "conv-adapter", name="one", batchnorm="train")
    tg.attach(model, "conv-adapter", name="two")
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for name, training in (("one", True), ("two", False), (None, False), ("one", True)):
        tg.activate(model, name)
        assert {n.training for n in norms} == {training}
        assert model.training


def test_every_adapter_has_its_own_head() -> None:
    model = _resnet()
    one = tg.attach(model, "linear", name="one", num_classes=3)
    two = tg.attach(model, "linear", name="two", num_classes=5)
    assert one.head is not two.head
    assert run(model, X).shape == (2, 5)
    tg.activate(model, "one")
    assert run(model, X).shape == (2, 3)
    tg.activate(model, None)
    assert run(model, X).shape == (2, 4)


# -- names ----------------------------------------------------------------------------------------------


BAD_NAMES = ["", "a.b", "a/b", "a b", "ä", "keys", "items", "pop", "training", "torchgraft", "x\n", 3, None]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_cannot_be_a_key_is_refused(name: object) -> None:
    model = _toy()
    remembered = Remembered(model, T)
    with pytest.raises(tg.GraftError, match="name=") as raised:
        attach(model, _affine("0"), T, name=name)
    assert "\n" not in str(raised.value)
    remembered.assert_same()


@pytest.mark.parametrize("name", ["a", "0", "cars-196_v2", "default", "head", "forward_"])
def test_other_names_are_fine(name: str) -> None:
    model = _toy()
    remembered = Remembered(model, T)
    attach(model, _affine("0"), T, name=name)
    assert list(tg.adapters(model)) == [name]
    tg.detach(model, name)
    remembered.assert_same()


def test_a_name_can_be_given_once() -> None:
    model = _toy()
    first = disturb(attach(model, _affine("0"), T))
    wanted = run(model, T)
    with pytest.raises(tg.GraftError, match="already has an adapter 'default'; detach it first"):
        attach(model, _affine("2"), T)
    assert tg.adapters(model) == {"default": first}
    assert torch.equal(run(model, T), wanted)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    model = _toy()
    for act in (tg.activate, tg.detach):
        with pytest.raises(tg.GraftError, match="no adapter 'cars'; nothing is attached"):
            act(model, "cars")
    attach(model, _affine("0"), T, name="cars")
    for act in (tg.activate, tg.detach):
        with pytest.raises(tg.GraftError, match="no adapter 'csrs'; did you mean 'cars'"):
            act(model, "csrs")
    assert tg.active(model) == "cars"
    tg.activate(_toy(), None)
    tg.detach(_toy())


# -- removing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", ["one", "two", "three"])
@pytest.mark.parametrize("active", ["one", "two", "three", None])
def test_detaching_one_adapter_keeps_the_others(removed: str, active: str | None) -> None:
    model, outputs = _resnet(), {}
    for seed, name in enumerate(("one", "two", "three")):
        disturb(tg.attach(model, "conv-adapter", name=name, num_classes=3, batchnorm="adapt"), 0.1, seed)
        outputs[name] = run(model, X)
    tg.activate(model, active)
    before = run(model, X)
    tg.detach(model, removed)
    left = [n for n in ("one", "two", "three") if n != removed]
    assert list(tg.adapters(model)) == left
    assert tg.active(model) == (left[-1] if active == removed else active), "the one attached last takes over"
    if active != removed:
        assert torch.equal(run(model, X), before)
    for name in left:
        tg.activate(model, name)
        assert torch.equal(run(model, X), outputs[name])
    held = {id(p) for p in model.parameters()}
    assert all(id(p) in held for a in tg.adapters(model).values() for p in a.parameters())
    assert not [k for k in model.state_dict() if f".adapters.{removed}." in k]


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one"), (None,)])
def test_detaching_all_restores_everything(order: tuple[str | None, ...]) -> None:
    model = _resnet()
    remembered = Remembered(model, X)
    disturb(tg.attach(model, "conv-adapter + norm-tuning", name="one", num_classes=3, batchnorm="train"), 0.1)
    disturb(tg.attach(model, "full", name="two", num_classes=5), 0.1)
    model.train()
    model(X).sum().backward()
    model.eval()
    for name in order:
        tg.detach(model, name)
    assert tg.adapters(model) == {}
    assert tg.active(model) is None
    remembered.assert_same()


def test_modules_that_only_one_adapter_used_are_plain_again_while_the_other_stays() -> None:
    model = _toy()
    attach(model, _affine("0"), T, name="one", lean=False)
    attach(model, _affine("2"), T, name="two", lean=False)
    tg.detach(model, "one")
    assert type(model[0]) is nn.Linear
    assert existing_point(model[0]) is None
    assert type(model[2]) is not nn.Linear


@pytest.mark.parametrize("active", ["one", "two", None])
def test_a_refused_attach_leaves_the_active_adapter_active(active: str | None) -> None:
    model = _resnet()
    for seed, name in enumerate(("one", "two")):
        disturb(tg.attach(model, "conv-adapter", name=name), 0.1, seed)
    tg.activate(model, active)
    remembered = Remembered(model, X)
    for options in ({"include": "nowhere"}, {"batchnorm": "thawed"}, {"num_classes": 0}, {"num_classes": 2.5}):
        with pytest.raises(tg.GraftError):
            tg.attach(model, "conv-adapter", name="three", **options)
    assert tg.active(model) == active
    remembered.assert_same()


@pytest.mark.parametrize("active", ["one", "two", None])
def test_an_attach_refused_by_its_last_check_leaves_the_active_adapter_active(active: str | None) -> None:
    from torchgraft.core.placements import Train

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Unused().eval()
    for name in ("one", "two"):
        disturb(attach(model, _affine("used"), T, name=name))
    tg.activate(model, active)
    remembered = Remembered(model, T)
    with pytest.raises(tg.GraftError, match="do not reach the output"):
        attach(model, lambda a: Train("unused", dict(a.module("unused")._parameters)), T, name="three")
    assert tg.active(model) == active
    remembered.assert_same()


# -- a part of an adapted model, and the whole of an adapted part ----------------------------------------


def test_adapters_of_a_part_and_of_the_whole_do_not_mix() -> None:
    part = _toy()
    inner = disturb(attach(part, _affine("0"), T))
    wanted = run(part, T)
    whole = nn.Sequential(part, nn.Linear(4, 2)).eval()
    try:
        attach(whole, _affine("0.2"), T)
    except tg.GraftError:
        pass
    else:
        tg.detach(whole)
    assert tg.adapters(part) == {"default": inner}
    assert torch.equal(run(part, T), wanted)
    held = {id(p) for p in part.parameters()}
    assert all(id(p) in held for p in inner.parameters())


def test_a_part_of_an_adapted_model_cannot_be_attached_to_behind_its_back() -> None:
    part = _toy()
    whole = nn.Sequential(part, nn.Linear(4, 2)).eval()
    outer = disturb(attach(whole, _affine("0.0"), T))
    wanted = run(whole, T)
    try:
        attach(part, _affine("0"), T)
    except tg.GraftError:
        pass
    else:
        tg.detach(part)
    assert torch.equal(run(whole, T), wanted)
    held = {id(p) for p in whole.parameters()}
    assert all(id(p) in held for p in outer.parameters())


# -- classifiers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_resetting_the_classifier_keeps_the_adapters_head(name: str, classes: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).eval()
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(1, 3, size, size)
    adapter = disturb(tg.attach(model, "conv-adapter", num_classes=5), 0.1)
    wanted, head = run(model, x), adapter.head
    model.reset_classifier(classes)
    assert adapter.head is head
    assert torch.equal(run(model, x), wanted)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}
    tg.activate(model, None)
    assert run(model, x).shape[1] == (classes or model.num_features)
    tg.activate(model, "default")
    assert torch.equal(run(model, x), wanted)
    tg.detach(model)
    assert run(model, x).shape[1] == (classes or model.num_features)
    assert not [k for k in model.state_dict() if "torchgraft" in k]
    assert type(model.get_classifier()).__name__ in ("Linear", "Identity")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("classes", [0, 7])
def test_a_head_can_be_attached_after_the_classifier_was_reset(name: str, classes: int) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    model.reset_classifier(classes)
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(1, 3, size, size)
    remembered = Remembered(model, x)
    adapter = tg.attach(model, "linear", num_classes=5)
    assert run(model, x).shape == (1, 5)
    assert adapter.head.in_features == model.num_features
    tg.detach(model)
    remembered.assert_same()


def test_a_model_without_a_classifier_takes_no_classes() -> None:
    model = timm.create_model("test_resnet", features_only=True).eval()
    remembered = Remembered(model, X)
    with pytest.raises(tg.GraftError, match=r"num_classes=5: .* has no classifier to replace") as raised:
        tg.attach(model, "conv-adapter", num_classes=5)
    assert "\n" not in str(raised.value)
    remembered.assert_same()
    tg.attach(model, "conv-adapter")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("method", ["conv-adapter", "bitfit", "norm-tuning", "full"])
def test_the_head_is_counted_apart_from_the_method(name: str, method: str) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    adapter = tg.attach(model, method, num_classes=5)
    head = sum(p.numel() for p in adapter.head.parameters())
    assert head == 5 * (model.num_features + 1)
    assert adapter.head_parameters() == head
    assert adapter.num_parameters() == sum(p.numel() for p in adapter.parameters()) - head


# -- copies ---------------------------------------------------------------------------------------------


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _saved}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("method", ["conv-adapter", "conv-adapter[scheme=residual-parallel]", "full"])
def test_a_copied_model_has_adapters_of_its_own(way: str, method: str) -> None:
    model = _resnet()
    remembered = Remembered(model, X)
    disturb(tg.attach(model, method, name="one", num_classes=5, batchnorm="adapt"), 0.1)
    disturb(tg.attach(model, "conv-adapter", name="two"), 0.1)
    tg.activate(model, "one")
    wanted = run(model, X)
    twin = COPIES[way](model)
    assert torch.equal(run(twin, X), wanted)
    assert list(tg.adapters(twin)) == ["one", "two"]
    assert tg.active(twin) == "one"
    assert tg.adapters(twin)["one"].model is twin
    disturb(tg.adapters(twin)["one"])
    assert not torch.equal(run(twin, X), wanted)
    assert torch.equal(run(model, X), wanted)
    tg.detach(twin)
    assert torch.equal(run(twin, X), remembered.output)
    assert {type(m) for m in twin.modules()} == set(remembered.seen["classes"].values())
    assert torch.equal(run(model, X), wanted)
    assert list(tg.adapters(model)) == ["one", "two"]
    tg.detach(model)
    remembered.assert_same()


def test_shared_modules_are_adapted_and_restored_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared).eval()
    remembered = Remembered(model, T)
    adapter = disturb(attach(model, _affine("0"), T))
    scale, shift = adapter.parameters()
    layer = lambda x: nn.functional.linear(x, shared.weight, shared.bias) * scale + shift  # noqa: E731
    assert torch.allclose(run(model, T), layer(torch.tanh(layer(T))))
    tg.detach(model)
    remembered.assert_same()


def test_the_summary_names_method_sites_and_parameters() -> None:
    model = _resnet()
    adapter = tg.attach(model, "conv-adapter[reduction=8]", name="cars", num_classes=5)
    text = adapter.summary()
    assert text.startswith("cars: conv-adapter[reduction=8] on ResNet")
    assert f"{len(adapter.sites)} sites, {adapter.num_parameters():,} trainable" in text
    assert "head: 5 classes" in text
    assert text in repr(adapter)


def test_an_adapter_that_would_add_nothing_is_refused() -> None:
    model = _toy()
    with pytest.raises(tg.GraftError, match="adds nothing"):
        attach(model, lambda _: [], T)
    attach(model, lambda _: Sequential(nn.Linear(4, 4), Point("0", "output")), T)
