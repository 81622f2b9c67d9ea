from __future__ import annotations

import pytest
import timm
import torch

import torchgraft as tg
from torchgraft.tasks import TrainConfig
from torchgraft.tasks.optim import make_optimizer, make_schedule, parameter_groups


def config(**changes):
    return TrainConfig(**{"data": "photos", "lr": 0.5, "head_lr": 0.25, "weight_decay": 0.125, **changes})


@pytest.fixture
def adapter():
    return tg.attach(timm.create_model("test_resnet"), "conv-adapter", num_classes=5)


def test_head_and_adapter_have_their_own_rates_and_vectors_are_not_decayed(adapter):
    groups = {group["name"]: group for group in parameter_groups(adapter, config())}
    assert groups["adapter"]["lr"] == groups["adapter-1d"]["lr"] == 0.5
    assert groups["head"]["lr"] == groups["head-1d"]["lr"] == 0.25
    for name, group in groups.items():
        assert group["weight_decay"] == (0.0 if name.endswith("-1d") else 0.125)
        assert all((p.ndim <= 1) == name.endswith("-1d") for p in group["params"])
    assert {id(p) for p in groups["head"]["params"] + groups["head-1d"]["params"]} == {
        id(p) for p in adapter.head.parameters()
    }


def test_the_groups_hold_every_parameter_of_the_adapter_once_and_nothing_else(adapter):
    grouped = [id(p) for group in parameter_groups(adapter, config()) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in adapter.parameters())
    assert len(set(grouped)) == len(grouped)


def test_without_a_head_rate_the_head_trains_at_the_adapters(adapter):
    assert {group["lr"] for group in parameter_groups(adapter, config(head_lr=None))} == {0.5}


def rates(settings, steps):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=settings.lr)
    schedule = make_schedule(optimizer, settings, steps)
    drawn = []
    for _ in range(steps):
        drawn.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return drawn


def test_warm_up_rises_linearly_to_the_peak_and_cosine_falls_to_the_floor():
    drawn = rates(config(warmup=0.2, min_lr=0.1), 20)
    assert drawn[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert drawn[4] == 0.5
    assert drawn[12] == pytest.approx(0.3)
    assert drawn[4:] == sorted(drawn[4:], reverse=True)
    assert 0.1 < drawn[-1] < 0.11


def test_a_constant_schedule_stays_at_the_peak():
    assert set(rates(config(warmup=0.0, schedule="constant"), 5)) == {0.5}


def test_both_optimisers_are_built(adapter):
    groups = parameter_groups(adapter, config())
    assert isinstance(make_optimizer(groups, config()), torch.optim.AdamW)
    sgd = make_optimizer(parameter_groups(adapter, config()), config(optimizer="sgd"))
    assert sgd.param_groups[0]["nesterov"]
    assert sgd.param_groups[0]["momentum"] == 0.9
