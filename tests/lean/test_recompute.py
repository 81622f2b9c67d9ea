"""Modules that run twice."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchgraft as tg
from torchgraft.core.layers import is_conv
from torchgraft.lean.hooks import Watched
from torchgraft.lean.install import make_lean
from torchgraft.lean.meter import saved_bytes
from torchgraft.lean.recompute import Recomputed
from torchgraft.swap import anatomy_of, has_layer, swap


class Block(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)
        self.drop, self.calls = nn.Dropout(drop), 0

    def forward(self, x: Tensor, scale: float = 1.0, *, other: Tensor | None = None) -> Tensor:
        self.calls += 1
        h = self.fc2(self.drop(self.act(self.fc1(self.norm(x))))) * scale
        return x + h if other is None else x + h * other


def _net(drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), *(Block(drop) for _ in range(3)))


def _gradients(model: nn.Module, x: Tensor, seed: int = 1) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _twice(model: nn.Sequential) -> nn.Sequential:
    for block in list(model)[1:]:
        swap(block, Recomputed)
    return model


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_gradients_are_equal_bit_for_bit_with_dropout_too(drop: float) -> None:
    model, x = _net(drop).train(), torch.randn(8, 16)
    wanted = _gradients(model, x)
    state = torch.get_rng_state()
    found = _gradients(_twice(model), x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # the second run draws nothing from what comes after


def test_only_the_inputs_are_kept() -> None:
    model, x = _net(), torch.randn(8, 16)
    own = [*model.parameters(), x]
    assert saved_bytes(lambda: _twice(model)(x), own) == 3 * 8 * 16 * 4


def test_the_second_run_ends_before_the_last_product() -> None:
    model, x = _twice(_net().requires_grad_(False)), torch.randn(8, 16, requires_grad=True)
    seen: list[str] = []
    for i, block in enumerate(list(model)[1:]):
        block.fc1.register_forward_hook(lambda *_, i=i: seen.append(f"fc1 {i}"))
        block.fc2.register_forward_hook(lambda *_, i=i: seen.append(f"fc2 {i}"))
    out = model(x).sum()
    first = len(seen)
    out.backward()
    assert seen[first:] == ["fc1 2", "fc1 1", "fc1 0"]


def test_a_graph_that_is_kept_can_be_gone_through_again() -> None:
    model, x = _twice(_net()), torch.randn(8, 16)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_keywords_and_several_tensors_arrive_in_the_second_run() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(8, 16, requires_grad=True)
    other = torch.rand(8, 16, requires_grad=True)
    wanted = torch.autograd.grad(block(x, 0.5, other=other).square().sum(), [x, other, *block.parameters()])
    swap(block, Recomputed)
    found = torch.autograd.grad(block(x, 0.5, other=other).square().sum(), [x, other, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_derived_input_is_known_as_derived_in_the_second_run_too() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
            self.down = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + self.mlp(h) + self.down(h).mean(-1, keepdim=True)

    torch.manual_seed(0)
    model, x = Branch(), torch.randn(8, 16, requires_grad=True)
    for frozen in (model.norm, model.mlp):
        frozen.requires_grad_(False)
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *model.down.parameters()])
    make_lean(model, [model.norm, *model.mlp.modules()], [model.down], again=[model.mlp])
    swap(model.down, Watched)
    found = torch.autograd.grad(model(x).square().sum(), [x, *model.down.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    kept = saved_bytes(lambda: model(x), [*model.parameters(), x])
    assert kept == 2 * 8 * 4  # the norm's statistics; everything else follows from x


def test_checkpointing_around_it_and_inference_work_as_ever() -> None:
    model, x = _net(), torch.randn(8, 16)
    wanted = _gradients(model, x)
    _twice(model)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))
    with torch.no_grad():
        calls = [b.calls for b in list(model)[1:]]
        model(x)
        assert [b.calls for b in list(model)[1:]] == [c + 1 for c in calls]


def test_a_module_that_changes_its_input_in_place_is_refused_in_place_of_being_run_wrongly() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(16, 16), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            x += 1.0
            return self.act(self.fc(x))

    block, x = InPlace(), torch.randn(8, 16, requires_grad=True)
    swap(block, Recomputed)
    with pytest.raises(RuntimeError, match="changes its input in place"):
        block(x * 2.0)


def test_a_block_that_a_branch_leaves_is_not_run_twice() -> None:
    import timm

    model = timm.create_model("resnet10t", num_classes=4)
    adapter = tg.attach(model, "repnet", lean="checkpoint")  # its branches read one block and end in a later one
    crossing = {h.path for _, p in adapter.placements for h in p.hooks()}
    assert crossing
    twice = [n for n, m in model.named_modules() if has_layer(m, Recomputed)]
    tg.attach(model, "conv-adapter", name="closed", lean="checkpoint")
    assert len([n for n, m in model.named_modules() if has_layer(m, Recomputed)]) >= max(1, len(twice))
    assert not any(is_conv(m) and Recomputed in anatomy_of(type(m))[1] for m in model.modules())


@pytest.mark.parametrize("policy", ["train", "adapt"])
def test_blocks_with_norms_that_follow_the_batch_keep_gradients_and_statistics(policy: str) -> None:
    found = {}
    for level in (False, "checkpoint"):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet")
        adapter = tg.attach(model, "lora", num_classes=3, batchnorm=policy, lean=level, fold=False)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()(torch.randn(4, 3, 64, 64)).square().mean().backward()
        statistics = [b for n, b in model.state_dict().items() if "running" in n]
        found[level] = [*(p.grad for p in adapter.parameters()), *statistics]
    assert all(torch.equal(a, b) for a, b in zip(found[False], found["checkpoint"], strict=True))
