"""Packed tensors: handles in place of copies, and errors where a copy would have been wrong."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from torchgraft.lean import saved
from torchgraft.lean.hooks import Watched
from torchgraft.lean.install import make_lean
from torchgraft.lean.meter import saved_bytes
from torchgraft.swap import swap


class LowRank(nn.Module):
    """A norm or activation whose output a trainable branch reads beside a frozen layer."""

    def __init__(self, first: nn.Module, features: int = 32) -> None:
        super().__init__()
        self.first = first.requires_grad_(False)
        self.base = nn.Linear(features, features).requires_grad_(False)
        self.down, self.up = nn.Linear(features, 2, bias=False), nn.Linear(2, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.base(h) + self.up(self.down(h))


def _lean(model: LowRank) -> LowRank:
    make_lean(model, [model.first, model.base], [model.down])
    swap(model.down, Watched)
    return model


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
    return list(grads)


@pytest.mark.parametrize(
    "first", [nn.LayerNorm(32), nn.GELU(), nn.SiLU(), nn.GroupNorm(4, 32)], ids=lambda m: type(m).__name__
)
def test_what_follows_from_a_kept_tensor_is_kept_as_a_handle(first: nn.Module) -> None:
    model, x = LowRank(first), torch.randn(16, 32, requires_grad=True)
    wanted = _gradients(model, x)
    own = [*model.parameters(), x]
    plain = saved_bytes(lambda: model(x), own)
    _lean(model)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model, x), wanted, strict=True))
    assert saved_bytes(lambda: model(x), own) == plain - 16 * 32 * 4


def test_a_view_of_a_derived_tensor_is_a_handle_too() -> None:
    class Rows(LowRank):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.base(h).sum() + self.up(self.down(h.unflatten(1, (3, 4)))).square().sum()

    model, x = Rows(nn.LayerNorm(32)), torch.randn(4, 12, 32, requires_grad=True)
    wanted = _gradients(model, x)
    own = [*model.parameters(), x]
    plain = saved_bytes(lambda: model(x), own)
    _lean(model)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model, x), wanted, strict=True))
    assert saved_bytes(lambda: model(x), own) == plain - 4 * 12 * 32 * 4


def test_a_tensor_changed_in_place_is_kept_itself() -> None:
    class InPlace(LowRank):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h += 1.0
            return self.base(h) + self.up(self.down(h))

    model, x = InPlace(nn.LayerNorm(32)), torch.randn(16, 32, requires_grad=True)
    wanted = _gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(_lean(model), x), wanted, strict=True))


def test_memory_that_is_used_again_is_not_mistaken_for_what_was_there() -> None:
    model, x = LowRank(nn.LayerNorm(32)), torch.randn(16, 32, requires_grad=True)
    _lean(model)
    before = len(saved._origins)
    for _ in range(5):
        model.first(x * 2)  # its output dies at once; its memory goes to the next tensor of that size
        other = torch.randn(16, 32)
        assert saved.origin_of(other) is None
    out = model(x)
    del out
    gc.collect()
    assert len(saved._origins) == before


def test_a_kept_tensor_that_is_changed_before_the_backward_is_an_error() -> None:
    model, x = LowRank(nn.LayerNorm(32)), torch.randn(16, 32, requires_grad=True)
    _lean(model)
    y = x * 1.0
    out = model(y)
    with torch.no_grad():
        y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_parameter_that_a_handle_reads_may_not_change_before_the_backward() -> None:
    model, x = LowRank(nn.LayerNorm(32)), torch.randn(16, 32, requires_grad=True)
    _lean(model)
    out = model(x)
    with torch.no_grad():
        model.first.weight.mul_(2.0)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match=r"before optimizer\.step|inplace operation"):
        out.sum().backward()


def test_of_a_small_view_only_the_view_is_kept() -> None:
    class ClassToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x * 2)[:, 0])

    model, x = ClassToken(), torch.randn(2, 50, 32, requires_grad=True)
    own = [*model.parameters(), x]
    assert saved_bytes(lambda: model(x), own) == 2 * 50 * 32 * 4
    wanted = _gradients(model, x)
    swap(model.head, Watched)
    assert saved_bytes(lambda: model(x), own) == 2 * 32 * 4
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model, x), wanted, strict=True))


def test_nothing_keeps_a_graph_alive_that_is_thrown_away() -> None:
    import weakref

    model, x = LowRank(nn.GELU()), torch.randn(16, 32, requires_grad=True)
    make_lean(model, [*model.modules()], [model.down])
    swap(model.down, Watched)
    out = model(x)
    node = weakref.ref(out)
    gc.disable()
    try:
        del out
        assert node() is None
    finally:
        gc.enable()
