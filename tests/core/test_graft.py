"""The graft point: what runs at an adapted module, what containers show, what taps carry."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchgraft as tg
from torchgraft.core.graft import (
    RESERVED,
    Tap,
    existing_point,
    first_output,
    first_tensor,
    graft_point,
    recomputing,
    remove_point,
    replace_first,
    replace_output,
)
from torchgraft.core.placements import Affine, Parallel, Point, Replace, Sequential

from .attaching import Remembered, assert_close, attach, disturb, run


class Pair(NamedTuple):
    map: Tensor
    extra: int


def _three() -> list[nn.Module]:
    return [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]


def _container(kind: type[nn.Module]) -> nn.Module:
    if kind is nn.ModuleDict:
        return nn.ModuleDict(dict(zip("abc", _three(), strict=True)))
    return nn.Sequential(*_three()) if kind is nn.Sequential else nn.ModuleList(_three())


# -- containers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_an_adapted_list_shows_what_it_holds_and_not_the_graft_point(kind: type[nn.Module]) -> None:
    container = _container(kind)
    members = list(container)
    graft_point(container)
    assert len(container) == 3
    assert list(container) == members
    assert list(reversed(container)) == members[::-1]
    assert [container[i] for i in (0, 1, 2, -1, -3)] == [*members, members[2], members[0]]
    for piece in (slice(1, None), slice(None, -1), slice(None, None, 2), slice(5, 9)):
        assert list(container[piece]) == members[piece]
        assert isinstance(container[piece], kind)
    assert members[1] in container
    with pytest.raises(IndexError):
        container[3]
    if kind is nn.Sequential:
        x = torch.randn(2, 4)
        assert torch.equal(container(x), members[2](members[1](members[0](x))))


def test_an_adapted_dictionary_shows_what_it_holds_and_not_the_graft_point() -> None:
    container = _container(nn.ModuleDict)
    members = dict(container.items())
    graft_point(container)
    assert len(container) == 3
    assert list(container) == list(container.keys()) == ["a", "b", "c"]
    assert list(container.values()) == list(members.values())
    assert dict(container.items()) == members
    assert container["b"] is members["b"]
    assert "a" in container
    assert RESERVED not in container


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
def test_a_container_is_what_it_was_when_the_point_is_gone(kind: type[nn.Module]) -> None:
    container = _container(kind)
    remembered = Remembered(container)
    graft_point(container)
    remove_point(container)
    remembered.assert_same()
    assert len(container) == 3


def test_a_slice_of_an_adapted_sequential_keeps_the_names_of_its_parts() -> None:
    container = nn.Sequential(OrderedDict(zip("abc", _three(), strict=True)))
    graft_point(container)
    assert list(container[1:].state_dict()) == ["c.weight", "c.bias"]


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_members_of_an_adapted_list_can_be_appended_replaced_and_deleted(kind: type[nn.Module]) -> None:
    container = _container(kind)
    point, fresh = graft_point(container), [nn.Linear(4, 4), nn.Linear(4, 4)]
    container.append(fresh[0])
    assert len(container) == 4
    assert container[-1] is fresh[0]
    container[-1] = fresh[1]
    assert container[3] is fresh[1]
    del container[1]
    assert len(container) == 3
    assert container[2] is fresh[1]
    assert existing_point(container) is point
    if kind is nn.Sequential:
        assert container(torch.randn(2, 4)).shape == (2, 4)


def test_an_adapter_at_a_container_acts_on_what_the_container_returns() -> None:
    model, x = nn.Sequential(nn.Sequential(*_three()), nn.Linear(4, 2)), torch.randn(2, 4)
    plain = run(model[0], x)
    adapter = attach(model, lambda _: Affine("0", nn.Parameter(torch.full((4,), 3.0)), None, axis=-1), x)
    assert_close(run(model[0], x), 3 * plain)
    assert_close(run(model, x), run(model[1], 3 * plain))
    assert [site.path for site in adapter.sites] == ["0"]


# -- points ---------------------------------------------------------------------------------------------


def test_a_point_is_made_once_and_found_again() -> None:
    linear = nn.Linear(4, 4)
    assert existing_point(linear) is None
    point = graft_point(linear)
    assert graft_point(linear) is point
    assert existing_point(linear) is point
    assert [name for name, _ in linear.named_children()] == [RESERVED]


def test_a_point_without_an_active_adapter_changes_nothing() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    plain = linear(x)
    graft_point(linear)
    assert torch.equal(linear(x), plain)
    assert list(linear.state_dict()) == ["weight", "bias"]


def test_actions_at_one_module_act_in_the_order_of_the_placements() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    plain = run(model, x)
    scale, shift = nn.Parameter(torch.full((4,), 3.0)), nn.Parameter(torch.full((4,), 5.0))
    adapter = attach(model, lambda _: [Affine("0", scale, None, axis=-1), Affine("0", None, shift, axis=-1)], x)
    assert_close(run(model, x), 3 * plain + 5)
    assert sorted(adapter.state_dict()) == ["0/affine.scale", "0/affine2.shift"]


def test_two_placements_that_take_the_place_of_one_forward_are_refused_or_both_act() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    try:
        adapter = attach(model, lambda _: [Replace("0", nn.Linear(4, 4)), Replace("0", nn.Linear(4, 4))], x)
    except tg.GraftError:
        return
    model(x).sum().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None] == []


def test_the_model_itself_can_be_the_home_of_a_placement() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(2, 4)
    remembered = Remembered(model, x)
    plain = run(model, x)
    disturb(attach(model, lambda _: Sequential(nn.Linear(3, 3), Point("", "output")), x))
    assert not torch.equal(run(model, x), plain)
    tg.detach(model)
    remembered.assert_same()


# -- taps -----------------------------------------------------------------------------------------------


def test_a_tap_gives_its_tensor_once() -> None:
    tap, x = Tap(), torch.randn(2)
    tap.put(x)
    assert tap.take() is x
    assert tap.value is None
    with pytest.raises(RuntimeError, match="before its source"):
        tap.take()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copied_tap_carries_no_tensor_over(copied) -> None:
    tap = Tap()
    tap.put(torch.randn(2, requires_grad=True) * 2)  # not a leaf: could not be copied
    assert copied(tap).value is None


def test_taps_of_a_copied_model_stay_paired_and_do_not_touch_the_original() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)
    adapter = attach(model, lambda _: Parallel(nn.Linear(4, 4), Point("0", "input"), Point("2", "output")), x)
    wanted = run(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, x), wanted)
    disturb(tg.adapters(twin)["default"])
    assert not torch.equal(run(twin, x), wanted)
    assert torch.equal(run(model, x), wanted)
    tg.detach(twin)
    assert tg.adapters(model) == {"default": adapter}
    assert torch.equal(run(model, x), wanted)


# -- arguments and outputs ------------------------------------------------------------------------------


def test_the_first_tensor_is_found_among_arguments_and_keywords() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert first_tensor((a, b), {}) is a
    assert first_tensor((None, b), {}) is b
    assert first_tensor((), {"mask": None, "x": b}) is b
    with pytest.raises(TypeError, match="without a tensor"):
        first_tensor((1,), {"flag": True})


def test_the_first_tensor_is_replaced_where_it_was_found() -> None:
    a, b, new = torch.zeros(1), torch.ones(1), torch.full((1,), 7.0)
    assert replace_first((a, b), {"k": 1}, new) == ((new, b), {"k": 1})
    assert replace_first((None, b), {}, new) == ((None, new), {})
    keywords = {"flag": True, "x": b}
    assert replace_first((), keywords, new) == ((), {"flag": True, "x": new})
    assert keywords["x"] is b
    with pytest.raises(TypeError, match="without a tensor"):
        replace_first((), {}, new)


OUTPUTS = {
    "tensor": lambda t: t,
    "tuple": lambda t: (t, "rest"),
    "list": lambda t: [t, "rest"],
    "named tuple": lambda t: Pair(t, 3),
    "dictionary": lambda t: {"map": t, "extra": "rest"},
    "ordered dictionary": lambda t: OrderedDict(map=t, extra="rest"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_first_tensor_of_an_output_is_found_and_replaced_and_the_rest_stays(kind: str) -> None:
    old, new = torch.zeros(1), torch.ones(1)
    out = OUTPUTS[kind](old)
    assert first_output(out) is old
    changed = replace_output(out, new)
    assert type(changed) is type(out)
    assert first_output(changed) is new
    assert first_output(out) is old, "the module's own object is left as it was"
    if isinstance(out, (tuple, list)):
        assert changed[1:] == out[1:]
    elif not isinstance(out, Tensor):
        assert list(changed) == list(out)
        assert changed["extra"] == "rest"


def test_the_first_tensor_of_a_transformers_output_is_found_and_replaced() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    old, new = torch.zeros(1), torch.ones(1)
    out = outputs.BaseModelOutputWithPooling(last_hidden_state=old, pooler_output=None, hidden_states=(old,))
    assert first_output(out) is old
    changed = replace_output(out, new)
    assert type(changed) is type(out)
    assert changed.last_hidden_state is new
    assert changed.hidden_states == (old,)
    assert out.last_hidden_state is old


# -- recomputation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_is_known_to_be_a_recomputation_only_inside_the_backward(reentrant: bool) -> None:
    seen = []

    def body(x: Tensor) -> Tensor:
        seen.append(recomputing())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(body, x, use_reentrant=reentrant).sum().backward()
    assert seen == [False, True]
    body(x)
    assert seen[-1] is False
