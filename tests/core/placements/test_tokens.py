"""Tokens: prompts inserted into a sequence and stripped again."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Tokens

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, run


class Prompts(nn.Module):
    def __init__(self, count: int = 3, width: int = 8) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(count, width))

    def forward(self) -> Tensor:
        return self.value


def _blocks(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(8, 2) for _ in range(count))).eval()


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 1), (0, 1)])
def test_the_blocks_between_see_the_prompts_and_nobody_else(first: int, last: int, prefix: int) -> None:
    model, form = _blocks(), Prompts()
    remembered = Remembered(model, X)
    h = X
    for i, block in enumerate(model):
        if i == first:
            h = torch.cat([h[:, :prefix], form.value.expand(2, 3, 8), h[:, prefix:]], 1)
        h = block(h)
        if i == last:
            h = torch.cat([h[:, :prefix], h[:, prefix + 3 :]], 1)
    wanted = h.detach()
    adapter = attach(model, lambda _: Tokens(form, str(first), str(last), prefix=prefix), X)
    assert run(model, X).shape == X.shape
    assert_close(run(model, X), wanted)
    assert_every_tensor_learns(adapter, X)
    tg.detach(model)
    remembered.assert_same()


def test_prompts_change_what_the_other_tokens_become() -> None:
    model = _blocks(1)
    plain = run(model, X)
    attach(model, lambda _: Tokens(Prompts(), "0", "0"), X)
    assert ((run(model, X) - plain).abs().amax((0, 2)) > 1e-6).all()


def test_deep_prompts_are_fresh_in_every_block() -> None:
    model, forms = _blocks(), [Prompts(count) for count in (3, 1, 2)]
    h = X
    for block, form in zip(model, forms, strict=True):
        count = len(form.value)
        h = block(torch.cat([h[:, :1], form.value.expand(2, -1, -1), h[:, 1:]], 1))
        h = torch.cat([h[:, :1], h[:, 1 + count :]], 1)
    wanted = h.detach()
    adapter = attach(model, lambda _: [Tokens(f, str(i), str(i), prefix=1) for i, f in enumerate(forms)], X)
    assert_close(run(model, X), wanted)
    assert_every_tensor_learns(adapter, X)


def test_two_sets_of_prompts_at_one_block_are_both_inserted_and_both_stripped() -> None:
    model, one, two = _blocks(1), Prompts(1), Prompts(2)
    adapter = attach(model, lambda _: [Tokens(one, "0", "0"), Tokens(two, "0", "0")], X)
    assert run(model, X).shape == X.shape
    tg.activate(model, None)
    joined = run(model, torch.cat([two.value.expand(2, -1, -1), one.value.expand(2, -1, -1), X], 1))[:, 3:]
    tg.activate(model, "default")
    assert_close(run(model, X), joined)  # attention does not care for the order of the prompts
    assert_every_tensor_learns(adapter, X)


def test_prompts_follow_the_dtype_of_the_sequence() -> None:
    model = _blocks(1)
    attach(model, lambda _: Tokens(Prompts(), "0", "0"), X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(run(model, X.bfloat16())).all()


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 8)])
def test_a_single_layer_is_refused_because_prompts_would_change_nothing_there(layer: nn.Module) -> None:
    support = Tokens.supports(layer)
    assert not support.forward
    assert support.reason
