"""Frozen means frozen: gradients, BatchNorm under every policy, dropout, modes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchgraft as tg
from torchgraft.core.frozen import own_parameters
from torchgraft.core.placements import Affine, Point, Sequential

from .attaching import Remembered, assert_close, attach, disturb, run


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    with torch.no_grad():
        for norm in (model[1], model[5]):
            norm.running_mean.add_(torch.randn(4))
            norm.running_var.add_(torch.rand(4))
    return model


def _branch(_: tg.Anatomy) -> Sequential:
    return Sequential(nn.Conv2d(4, 4, 1, bias=False), Point("4", "output"))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _train(model: nn.Module, adapter: tg.Adapter, steps: int = 3) -> list[Tensor]:
    """A few steps of SGD; returns the outputs."""
    model.train()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    outputs = []
    for step in range(steps):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        out = model(x)
        outputs.append(out.detach())
        optimiser.zero_grad()
        out.square().sum().backward()
        optimiser.step()
    return outputs


def _statistics(model: nn.Module) -> list[Tensor]:
    """The backbone's own buffers, whatever adapters show in their place."""
    own = [m for p, m in model.named_modules() if "torchgraft" not in p]
    return [b.clone() for m in own for b in m._buffers.values() if b is not None]


# -- gradients ------------------------------------------------------------------------------------------


def test_only_the_adapter_trains_and_detaching_gives_every_flag_back() -> None:
    model = _network()
    model[0].weight.requires_grad_(False)
    remembered = Remembered(model.eval(), X)
    adapter = attach(model, _branch, X)
    own = {id(p) for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    tg.detach(model)
    remembered.assert_same()
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("policy", ["frozen", "adapt", "train"])
def test_training_changes_no_bit_of_the_backbone(policy: str) -> None:
    model = _network().eval()
    remembered = Remembered(model, X)
    adapter = attach(model, _branch, X, batchnorm=policy)
    before = [t.clone() for t in adapter.state_dict().values()]
    statistics = _statistics(model)
    _train(model, adapter)
    assert all(torch.equal(a, b) for a, b in zip(_statistics(model), statistics, strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(adapter.state_dict().values(), before, strict=True)]
    assert all(changed), "everything that the adapter owns moved"
    model.eval()
    tg.detach(model)
    remembered.assert_same()


# -- BatchNorm policies ---------------------------------------------------------------------------------


def test_frozen_batchnorms_compute_in_training_what_they_compute_in_inference() -> None:
    model = _network().eval()
    attach(model, _branch, X)
    wanted = run(model, X)
    model.train()
    assert torch.equal(run(model, X), wanted)
    assert model.training
    assert not model[1].training
    assert not model[5].training


def test_policy_train_is_the_official_loop() -> None:
    model, official = _network(), _network()
    adapter = attach(model, _branch, X, batchnorm="train")
    branch = copy.deepcopy(adapter.placements[0][1].form)
    official[3].eval()
    official[4] = nn.Sequential(official[4], _Residual(branch))
    for parameter in official.parameters():
        parameter.requires_grad_(False)
    branch.requires_grad_(True)
    official.train()
    official[3].eval()  # dropout stays silent
    optimiser = torch.optim.SGD(branch.parameters(), lr=0.1)
    wanted = []
    for step in range(3):
        out = official(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step)))
        wanted.append(out.detach())
        optimiser.zero_grad()
        out.square().sum().backward()
        optimiser.step()
    for found, out in zip(_train(model, adapter), wanted, strict=True):
        assert_close(found, out)
    state = adapter.state_dict()
    for path in ("1", "5"):
        for name, value in official[int(path)].named_buffers():
            assert_close(state[f"{path}/stats.{name}"].float(), value.float())
    assert_close(run(model.eval(), X), run(official.eval(), X))


class _Residual(nn.Module):
    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return x + self.form(x)


def test_policy_adapt_follows_the_task_and_two_adapters_follow_their_own() -> None:
    model = _network().eval()
    plain = run(model, X)
    one = attach(model, _branch, X, name="one", batchnorm="adapt")
    model.train()
    for _ in range(3):
        model(5 + X)
    two = attach(model, _branch, X, name="two", batchnorm="adapt")
    kept = {n: t.clone() for n, t in one.state_dict().items()}
    for _ in range(3):
        model(-5 - X)
    assert all(torch.equal(t, kept[n]) for n, t in one.state_dict().items())
    name = "1/stats.running_mean"
    backbone = model[1]._buffers["running_mean"]
    assert ((one.state_dict()[name] - backbone) * (two.state_dict()[name] - backbone)).min() < 0, "opposite ways"
    model.eval()
    outputs = {}
    for active in ("one", "two", None):
        tg.activate(model, active)
        outputs[active] = run(model, X)
    assert torch.equal(outputs[None], plain)
    assert not torch.equal(outputs["one"], outputs["two"])
    tg.activate(model, "one")
    assert torch.equal(run(model, X), outputs["one"])


def test_switching_from_a_training_batchnorm_to_a_frozen_one_changes_its_mode() -> None:
    model = _network()
    attach(model, _branch, X, name="moving", batchnorm="train")
    model.train()
    assert model[1].training
    frozen = attach(model, _branch, X, name="still")
    assert not model[1].training
    assert frozen.batchnorm == "frozen"
    tg.activate(model, "moving")
    assert model[1].training
    tg.activate(model, None)
    assert not model[1].training
    model.eval()
    tg.activate(model, "moving")
    assert not model[1].training


def test_statistics_are_saved_and_loaded_with_the_adapter() -> None:
    model = timm.create_model("test_resnet").eval()
    adapter = tg.attach(model, "conv-adapter", batchnorm="adapt")
    model.train()
    model(3 + torch.randn(2, 3, 64, 64))
    model.eval()
    twin = copy.deepcopy(model)
    state = {n: t.clone() for n, t in adapter.state_dict().items()}
    assert sum("running_var" in n for n in state) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    other = tg.adapters(twin)["default"]
    other.load_state_dict({n: torch.zeros_like(t) for n, t in state.items()})
    other.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(run(model, x), run(twin, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_batchnorm_of_the_adapters_own_counts_a_recomputed_batch_once(reentrant: bool) -> None:
    def build() -> tuple[nn.Module, tg.Adapter]:
        model = _network().eval()
        adapter = attach(model, lambda _: Sequential(nn.BatchNorm2d(4), Point("5", "output"), skip=False), X)
        model.train()
        return model, adapter

    (plain, wanted), (model, adapter) = build(), build()
    for step in range(3):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step)).requires_grad_()
        plain(x).square().sum().backward()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for (name, found), tensor in zip(adapter.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(found, tensor), name
    assert [int(t) for n, t in adapter.state_dict().items() if "tracked" in n] == [3]


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    model = _network().eval()
    remembered = Remembered(model, X)
    with pytest.raises(tg.GraftError, match="batchnorm='frosen': did you mean 'frozen'"):
        attach(model, _branch, X, batchnorm="frosen")
    remembered.assert_same()


def test_a_batchnorm_without_running_statistics_keeps_using_those_of_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1)).eval()
    plain = run(model, X)
    make = lambda _: Affine("2", nn.Parameter(torch.ones(4)), None, axis=1)  # noqa: E731
    adapter = attach(model, make, X, batchnorm="adapt")
    assert [n for n in adapter.state_dict() if "running" in n] == []
    model.train()
    assert_close(run(model, X), plain)


# -- dropout and modes ----------------------------------------------------------------------------------


def test_the_backbones_dropout_is_silent_unless_it_is_asked_for() -> None:
    model = _network()
    attach(model, _branch, X)
    model.train()
    assert torch.equal(run(model, X), run(model, X))
    tg.detach(model)
    attach(model, _branch, X, dropout=True)
    model.train()
    assert not torch.equal(run(model, X), run(model, X))
    model.eval()
    assert torch.equal(run(model, X), run(model, X))


def test_every_adapter_keeps_its_own_wish_about_dropout() -> None:
    model = _network()
    attach(model, _branch, X, name="silent")
    attach(model, _branch, X, name="noisy", dropout=True)
    model.train()
    tg.activate(model, "silent")
    assert torch.equal(run(model, X), run(model, X))
    tg.activate(model, "noisy")
    assert not torch.equal(run(model, X), run(model, X))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_stochastic_depth_and_dropout_of_timm_models_stay_off(name: str) -> None:
    torch.manual_seed(0)
    options = {"drop_path_rate": 0.9, "drop_rate": 0.9}
    if name == "test_vit":
        options |= {"proj_drop_rate": 0.9, "attn_drop_rate": 0.9, "pos_drop_rate": 0.9}
    model = timm.create_model(name, **options).eval()
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(1, 3, size, size)
    disturb(tg.attach(model, "conv-adapter"))
    wanted = run(model, x)
    model.train()
    assert torch.equal(run(model, x), wanted)


def test_dropout_of_an_adapters_own_modules_acts_in_training() -> None:
    model = _network()
    attach(model, lambda _: Sequential(nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 1)), Point("4", "output")), X)
    model.train()
    assert not torch.equal(run(model, X), run(model, X))


@pytest.mark.parametrize("training", [False, True])
def test_detaching_gives_every_module_its_own_mode_back(training: bool) -> None:
    model = _network().train(training)
    model[1].train(not training)  # set by hand, as scripts that freeze BatchNorm do
    model[3].train(not training)
    modes = [m.training for m in model.modules()]
    attach(model, _branch, X)
    tg.detach(model)
    assert [m.training for m in model.modules()] == modes


def test_attaching_in_training_mode_leaves_the_model_in_training_mode() -> None:
    model = _network().train()
    statistics = _statistics(model)
    adapter = attach(model, _branch, X, batchnorm="train")
    assert model.training
    assert all(m.training for _, p in adapter.placements for m in p.modules())
    assert all(torch.equal(a, b) for a, b in zip(_statistics(model), statistics, strict=True)), "no dry run counts"
    assert all(int(t) == 0 for n, t in adapter.state_dict().items() if "tracked" in n)


def test_own_parameters_do_not_count_adapters() -> None:
    model = _network()
    count = sum(p.numel() for p in model.parameters())
    attach(model, _branch, X)
    assert own_parameters(model) == count
