from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torchgraft as tg
from torchgraft.bench.subjects import LEVELS, PEERS, Setting, as_list, backbone, default_methods, lora_layers, subject
from torchgraft.lean import meter

TINY = {"resnet10t": 32, "test_efficientnet": 32, "test_convnext": 32, "test_vit": 32}


def tiny(name: str, **options) -> Setting:
    return Setting(name, batch=2, image_size=TINY[name], **options)


@pytest.mark.parametrize("name", TINY)
def test_no_part_of_a_backbone_is_blank(name: str) -> None:
    model = backbone(tiny(name))
    assert not model.training
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var - 1, module.weight - 1, module.bias):
                assert tensor.std() > 0.01
    scales = [p for n, p in model.named_parameters() if n.endswith("gamma")]
    assert all(p.min() >= 0.2 and p.max() <= 0.6 for p in scales)
    assert bool(scales) == (name == "test_convnext")


@pytest.mark.parametrize("name", TINY)
def test_every_trained_tensor_of_every_default_method_gets_a_gradient_that_is_not_zero(name: str) -> None:
    setting = tiny(name)
    for method in [*PEERS, *default_methods(backbone(setting))]:
        one = subject(setting, method)
        assert all(g.any() for g in one.gradients().values()), method
        assert all(p.grad is None for p in one.model.parameters())


def test_the_same_seed_gives_the_same_values_at_every_level_and_another_seed_others() -> None:
    def values(level: str, seed: int = 0):
        one = subject(tiny("test_convnext", seed=seed), "conv-adapter", level)
        return [*one.model.parameters(), *one.adapter.parameters(), one.image]

    plain = values("plain")
    for level in LEVELS:
        assert all(map(torch.equal, values(level), plain)), level
    other = values("plain", seed=1)
    assert not torch.equal(other[0], plain[0]) and not torch.equal(other[-1], plain[-1])


def test_building_a_subject_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    subject(tiny("test_vit"), "lora")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_peers_train_what_their_names_say() -> None:
    setting = tiny("resnet10t")
    full, linear, peft = (subject(setting, peer) for peer in PEERS)
    assert len(full.trained()) == len(list(full.model.parameters()))
    assert full.model.bn1.training and not linear.model.bn1.training
    assert list(linear.trained()) == ["fc.weight", "fc.bias"]
    trained = [re.sub(r"base_model\.model\.|\.default\.weight", "", n) for n in peft.trained() if "fc" not in n]
    assert trained == [f"{path}.lora_{x}" for path in lora_layers(backbone(setting)) for x in "AB"]


@pytest.mark.parametrize("name", TINY)
def test_our_lora_stands_on_the_layers_of_its_peer_and_trains_as_many_values(name: str) -> None:
    setting = tiny(name)
    ours, theirs = subject(setting, "lora"), subject(setting, "peft-lora")
    assert [site.path for site in ours.adapter.sites] == lora_layers(backbone(setting))
    count = [sum(p.numel() for p in one.trained().values()) for one in (ours, theirs)]
    assert count[0] == count[1]


def test_a_lora_with_targets_of_its_own_keeps_them() -> None:
    one = subject(tiny("test_vit"), "lora[targets=fc1]")
    assert {s.path.rpartition(".")[2] for s in one.adapter.sites} == {"fc1"}


@pytest.mark.parametrize("method", ["full", "peft-lora", "ssf"])
def test_a_ghost_keeps_as_many_bytes_as_the_real_one(method: str) -> None:
    one = subject(tiny("test_convnext"), method)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ghost = one.ghost(mode)
    with mode:
        counted = meter.saved_bytes(ghost.loss, ghost.held())
    assert counted == meter.saved_bytes(one.loss, one.held()) > 0


def test_what_cannot_be_measured_is_one_line_that_says_what_to_do(monkeypatch) -> None:
    with pytest.raises(tg.GraftError, match=r"'exakt'.*'exact'"):
        subject(tiny("test_vit"), "lora", "exakt")
    with pytest.raises(tg.GraftError, match=r"'fp23'.*'fp32'"):
        tiny("test_vit", dtype="fp23")
    with pytest.raises(tg.GraftError, match="not written down which layers"):
        lora_layers(nn.Sequential(nn.Linear(2, 2)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(tg.GraftError, match="HF peft is not installed"):
        subject(tiny("test_vit"), "peft-lora")


def test_commas_within_brackets_do_not_part_methods() -> None:
    assert as_list("ssf, lora[rank=4,alpha=4],linear", ()) == ["ssf", "lora[rank=4,alpha=4]", "linear"]
    assert as_list(None, ("a", "b")) == ["a", "b"]
