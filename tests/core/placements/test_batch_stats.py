"""BatchStats: the adapter's own running statistics of one BatchNorm."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable

import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchgraft as tg
from torchgraft.core.placements import BatchStats, Point, Sequential

from ..attaching import Remembered, assert_close, attach, run

NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "1d on vectors": (nn.BatchNorm1d, (6, 4)),
    "1d on sequences": (nn.BatchNorm1d, (3, 4, 5)),
    "2d": (nn.BatchNorm2d, (3, 4, 5, 6)),
    "3d": (nn.BatchNorm3d, (3, 4, 2, 3, 2)),
    "timm, with activation": (tl.BatchNormAct2d, (3, 4, 5, 6)),
}


def _norm(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    norm = NORMS[kind][0](4, **options)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.add_(torch.rand(4))
    return norm


def _batches(kind: str, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [2 + 3 * torch.randn(NORMS[kind][1], generator=generator) for _ in range(count)]


def _stats(adapter: tg.Adapter) -> dict[str, Tensor]:
    return {k.rpartition(".")[2]: v.clone() for k, v in adapter.state_dict().items() if "/stats." in k}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", NORMS)
def test_mode_train_is_batchnorm_as_official_loops_run_it(kind: str, momentum: float | None) -> None:
    norm = _norm(kind, momentum=momentum)
    model, official = nn.Sequential(norm).eval(), copy.deepcopy(norm).train()
    remembered = Remembered(model, _batches(kind)[0])
    adapter = attach(model, lambda a: BatchStats("0", a.module("0"), "train"), _batches(kind)[0])
    model.train()
    for x in _batches(kind):
        assert_close(model(x).detach(), official(x).detach())
    for name, value in _stats(adapter).items():
        assert torch.equal(value, getattr(official, name)), name
    model.eval()
    x = _batches(kind)[0]
    assert_close(run(model, x), run(official.eval(), x))
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", NORMS)
def test_mode_adapt_follows_the_batch_and_then_normalises_with_the_running_statistics(
    kind: str, momentum: float | None
) -> None:
    norm = _norm(kind, momentum=momentum)
    model = nn.Sequential(norm).eval()
    remembered = Remembered(model, _batches(kind)[0])
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    adapter = attach(model, lambda a: BatchStats("0", a.module("0"), "adapt"), _batches(kind)[0])
    model.train()
    for step, x in enumerate(_batches(kind), start=1):
        rate = 1 / step if momentum is None else momentum
        flat = x.transpose(0, 1).flatten(1)
        mean, var = (1 - rate) * mean + rate * flat.mean(1), (1 - rate) * var + rate * flat.var(1)
        wanted = F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)
        if kind.startswith("timm"):
            wanted = wanted.relu()
        assert_close(model(x).detach(), wanted.detach())
    found = _stats(adapter)
    assert_close(found["running_mean"], mean)
    assert_close(found["running_var"], var)
    assert found["num_batches_tracked"] == 3
    model.eval()
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize("mode", ["train", "adapt"])
def test_inference_changes_no_statistics(mode: str) -> None:
    model, x = nn.Sequential(_norm("2d")).eval(), _batches("2d")[0]
    plain = run(model, x)
    adapter = attach(model, lambda a: BatchStats("0", a.module("0"), mode), x)
    before = _stats(adapter)
    assert torch.equal(run(model, x), plain)
    assert all(torch.equal(v, before[n]) for n, v in _stats(adapter).items())


def test_a_single_value_per_channel_does_not_spoil_the_statistics() -> None:
    x = torch.randn(1, 4, 1, 1)
    model = nn.Sequential(_norm("2d")).eval()
    adapter = attach(model, lambda a: BatchStats("0", a.module("0"), "adapt"), x)
    model.train()
    with contextlib.suppress(ValueError):  # BatchNorm itself refuses such a batch in training
        model(x)
    assert all(torch.isfinite(v).all() for v in _stats(adapter).values())


def _trunk(mode: str) -> tuple[nn.Sequential, tg.Adapter]:
    """Two convolutions with something trainable behind each, their BatchNorms, and the adapter's statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    x = torch.randn(2, 3, 8, 8)

    def make(anatomy: tg.Anatomy) -> list:
        own = [Sequential(nn.Conv2d(4, 4, 1, bias=False), Point(p, "output")) for p in ("0", "3")]
        return own + [BatchStats(p, anatomy.module(p), mode) for p in ("1", "4")]

    adapter = attach(model, make, x)
    model.train()
    return model, adapter


@pytest.mark.parametrize("mode", ["train", "adapt"])
def test_two_forwards_before_one_backward_are_allowed(mode: str) -> None:
    model, adapter = _trunk(mode)
    (model(torch.randn(2, 3, 8, 8)).square().sum() + model(torch.randn(2, 3, 8, 8)).square().sum()).backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("mode", ["train", "adapt"])
def test_gradient_checkpointing_counts_a_batch_once_and_keeps_the_gradients(
    mode: str, pieces: int, reentrant: bool
) -> None:
    plain, plain_adapter = _trunk(mode)
    model, adapter = _trunk(mode)
    cuts = {1: [0, 5], 2: [0, 2, 5], 5: [0, 1, 2, 3, 4, 5]}[pieces]
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, generator=generator)
        for one in (plain_adapter, adapter):
            for parameter in one.parameters():
                parameter.grad = None
        cotangent = torch.randn(2, 4, 4, 4, generator=generator)
        plain(x.clone().requires_grad_()).backward(cotangent)
        h = x.clone().requires_grad_()
        for start, stop in itertools.pairwise(cuts):
            h = checkpoint(model[start:stop], h, use_reentrant=reentrant)
        h.backward(cotangent)
        for a, b in zip(adapter.parameters(), plain_adapter.parameters(), strict=True):
            assert_close(a.grad, b.grad, 1e-4)
    for (name, a), b in zip(adapter.state_dict().items(), plain_adapter.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_statistics_belong_to_batchnorms_only() -> None:
    for layer in (nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4)):
        support = BatchStats.supports(layer)
        assert not support.forward
        assert support.reason
    assert BatchStats.supports(nn.BatchNorm2d(4)).forward
