"""Swapping layers in front of a module's class, and taking them away again."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

from torchgraft import swap as swapping
from torchgraft.swap import has_layer, original_class, swap, unswap


class Doubles:
    swap_rank = 0

    def forward(self, *args):
        return 2 * super().forward(*args)


class AddsOne:
    swap_rank = 1

    def forward(self, *args):
        return 1 + super().forward(*args)


class Negates:
    swap_rank = 1  # the same rank: the name decides

    def forward(self, *args):
        return -super().forward(*args)


class ReadsTenfold:
    swap_rank = 3

    def _view(self, name: str) -> Tensor:
        held = self._parameters.get(name)
        return 10 * (held if held is not None else self._buffers[name])


class Careless:
    def _view(self, name: str) -> Tensor:
        return self.there_is_no_such_thing


class KeepsItsOwnState(nn.Linear):
    """A layer that says itself what is pickled, as some libraries do."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.cache = "filled"

    def __getstate__(self):
        return {**self.__dict__, "cache": "emptied"}


LAYERS = (Doubles, AddsOne, Negates)


def test_a_swapped_module_is_the_same_object_of_a_subclass_of_its_class() -> None:
    linear = nn.Linear(3, 2)
    before = dict(vars(linear))
    swap(linear, Doubles)
    assert isinstance(linear, nn.Linear)
    assert isinstance(linear, Doubles)
    assert type(linear) is not nn.Linear
    assert type(linear).__module__ == nn.Linear.__module__
    assert original_class(linear) is nn.Linear
    assert linear.in_features == 3
    assert vars(linear) == before
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_unswap_brings_the_very_class_back() -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = linear(x)
    swap(linear, Doubles)
    assert torch.equal(linear(x), 2 * plain)
    unswap(linear, Doubles)
    assert type(linear) is nn.Linear
    assert torch.equal(linear(x), plain)


@pytest.mark.parametrize("order", itertools.permutations(LAYERS), ids=lambda o: "-".join(c.__name__ for c in o))
def test_the_rank_orders_the_layers_whatever_the_order_of_swapping(order: tuple[type, ...]) -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = linear(x)
    for layer in order:
        swap(linear, layer)
    assert [c for c in type(linear).__mro__ if c in LAYERS] == [Doubles, AddsOne, Negates]
    assert torch.equal(linear(x), 2 * (1 + -plain))
    for layer in order:
        assert has_layer(linear, layer)
        unswap(linear, layer)
        assert not has_layer(linear, layer)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("removed", LAYERS)
def test_removing_one_layer_keeps_the_others(removed: type) -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = linear(x)
    for layer in LAYERS:
        swap(linear, layer)
    unswap(linear, removed)
    wanted = {Doubles: 1 - plain, AddsOne: 2 * -plain, Negates: 2 * (1 + plain)}[removed]
    assert torch.equal(linear(x), wanted)


def test_swapping_twice_is_swapping_once_and_removing_what_is_not_there_does_nothing() -> None:
    linear = nn.Linear(3, 2)
    unswap(linear, Doubles)
    assert type(linear) is nn.Linear
    swap(linear, Doubles)
    once = type(linear)
    swap(linear, Doubles)
    assert type(linear) is once
    unswap(linear, AddsOne)
    assert type(linear) is once


def test_one_class_is_generated_per_combination_and_other_modules_are_left_alone() -> None:
    one, two, plain, conv = nn.Linear(3, 2), nn.Linear(5, 7), nn.Linear(3, 2), nn.Conv2d(3, 2, 1)
    names = set(vars(nn.Linear))
    swap(one, Doubles)
    swap(two, Doubles)
    swap(conv, Doubles)
    assert type(one) is type(two)
    assert type(conv) is not type(one)
    assert isinstance(conv, nn.Conv2d) and not isinstance(conv, nn.Linear)
    swap(two, Doubles, ("weight",))
    assert type(one) is not type(two)
    assert type(plain) is nn.Linear
    assert set(vars(nn.Linear)) == names
    assert isinstance(nn.Linear.__dict__.get("weight"), type(None))


def test_generated_classes_of_two_bases_do_not_share_the_code_of_forward() -> None:
    linear, conv = nn.Linear(3, 2), nn.Conv2d(3, 2, 1)
    swap(linear, Doubles)
    swap(conv, Doubles)
    assert type(linear).forward.__code__ is not type(conv).forward.__code__
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(conv(x), 2 * nn.Conv2d.forward(conv, x))


# -- views ----------------------------------------------------------------------------------------------


def test_a_viewed_parameter_is_read_through_the_layer_and_stored_as_it_was() -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    weight = linear.weight
    swap(linear, ReadsTenfold, ("weight",))
    assert torch.equal(linear.weight, 10 * weight)
    assert torch.equal(linear(x), nn.functional.linear(x, 10 * weight, linear.bias))
    assert linear._parameters["weight"] is weight
    assert dict(linear.named_parameters())["weight"] is weight
    assert torch.equal(linear.state_dict()["weight"], weight)
    unswap(linear, ReadsTenfold)
    assert linear.weight is weight


def test_a_viewed_buffer_is_read_through_the_layer() -> None:
    norm, x = nn.BatchNorm1d(3).eval(), torch.randn(4, 3)
    swap(norm, ReadsTenfold, ("running_var",))
    assert torch.equal(norm.running_var, torch.full((3,), 10.0))
    assert torch.allclose(norm(x), x / (10 + norm.eps) ** 0.5)
    assert torch.equal(norm._buffers["running_var"], torch.ones(3))


def test_a_second_swap_adds_its_views_to_the_first() -> None:
    linear = nn.Linear(3, 2)
    swap(linear, ReadsTenfold, ("weight",))
    swap(linear, ReadsTenfold, ("bias",))
    assert torch.equal(linear.weight, 10 * linear._parameters["weight"])
    assert torch.equal(linear.bias, 10 * linear._parameters["bias"])


def test_views_survive_the_removal_of_another_layer() -> None:
    linear = nn.Linear(3, 2)
    swap(linear, ReadsTenfold, ("weight",))
    swap(linear, Doubles)
    unswap(linear, Doubles)
    assert torch.equal(linear.weight, 10 * linear._parameters["weight"])


def test_views_leave_with_their_layer_while_another_layer_stays() -> None:
    linear = nn.Linear(3, 2)
    swap(linear, ReadsTenfold, ("weight",))
    swap(linear, Doubles)
    unswap(linear, ReadsTenfold)
    assert linear.weight is linear._parameters["weight"]
    assert not isinstance(getattr(type(linear), "weight", None), property)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_writes_the_stored_parameter(assign: bool) -> None:
    linear, new = nn.Linear(3, 2), {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    swap(linear, ReadsTenfold, ("weight",))
    linear.load_state_dict(new, assign=assign)
    assert torch.equal(linear._parameters["weight"], torch.ones(2, 3))
    assert torch.equal(linear.weight, torch.full((2, 3), 10.0))


def test_assigning_a_parameter_replaces_the_stored_one() -> None:
    linear, fresh = nn.Linear(3, 2), nn.Parameter(torch.ones(2, 3))
    swap(linear, ReadsTenfold, ("weight",))
    linear.weight = fresh
    assert linear._parameters["weight"] is fresh


def test_a_mistake_inside_a_view_is_seen_and_does_not_give_the_plain_weight() -> None:
    linear = nn.Linear(3, 2)
    swap(linear, Careless, ("weight",))
    with pytest.raises(Exception, match="there_is_no_such_thing"):
        linear(torch.randn(4, 3))


# -- copies ---------------------------------------------------------------------------------------------


def _saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _saved}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_swapped_alike_and_independent(way: str) -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    swap(linear, Doubles)
    swap(linear, ReadsTenfold, ("weight",))
    before = linear(x)
    twin = COPIES[way](linear)
    assert type(twin) is type(linear)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin._parameters["weight"].zero_()
    assert torch.equal(linear(x), before)
    for layer in (Doubles, ReadsTenfold):
        unswap(twin, layer)
    assert type(twin) is nn.Linear
    assert has_layer(linear, Doubles)


def test_a_pickle_is_read_by_a_process_that_has_generated_no_class_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    swap(linear, Doubles)
    swap(linear, ReadsTenfold, ("weight",))
    stored = pickle.dumps(linear)
    monkeypatch.setattr(swapping, "_generated", {})
    twin = pickle.loads(stored)
    assert type(twin) is not type(linear)
    assert torch.equal(twin(x), linear(x))
    assert original_class(twin) is nn.Linear


def test_a_class_that_chooses_its_pickled_state_is_asked_for_it() -> None:
    layer = KeepsItsOwnState()
    swap(layer, Doubles)
    assert pickle.loads(pickle.dumps(layer)).cache == "emptied"
    assert copy.deepcopy(layer).cache == "emptied"
    assert layer.cache == "filled"
