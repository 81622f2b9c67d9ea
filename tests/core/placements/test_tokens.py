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


def test_tokens_that_overwrite_stay_in_the_place_of_the_first_ones() -> None:
    model, form = _blocks(), Prompts()
    h = X
    for block in model:
        h = block(torch.cat([h[:, :1], form.value.expand(2, -1, -1), h[:, 4:]], 1))
    wanted = h.detach()
    adapter = attach(model, lambda _: [Tokens(form, str(i), str(i), prefix=1, overwrite=True) for i in range(3)], X)
    assert_close(run(model, X), wanted)
    assert_every_tensor_learns(adapter, X)


def test_tokens_that_are_not_stripped_are_returned_behind_the_prefix() -> None:
    model, form = _blocks(1), Prompts()
    joined = torch.cat([X[:, :1], form.value.expand(2, -1, -1), X[:, 1:]], 1)
    wanted = run(model, joined.detach())
    attach(model, lambda _: Tokens(form, "0", "0", prefix=1, strip=False), X)
    assert_close(run(model, X), wanted)


class Masked(nn.Module):
    """Blocks that are all given the same mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = _blocks(2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return x


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("rows", [1, 5])
def test_masks_grow_on_the_way_so_that_everyone_sees_the_prompts(dtype: torch.dtype, rows: int) -> None:
    visible = torch.ones(2, 1, rows, 5, dtype=torch.bool)
    visible[..., 4] = False
    mask = visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    model, form = Masked().eval(), Prompts()
    attach(model, lambda _: Tokens(form, "blocks.0", "blocks.1", prefix=1, through=["blocks.1"]), X, mask)
    before, changed = run(model, X, mask), X.clone()
    changed[:, 4] += torch.randn(8)
    assert_close(run(model, changed, mask)[:, :4], before[:, :4])  # the last token is still hidden from the others
    with torch.no_grad():
        form.value.add_(torch.randn(8))
    assert ((run(model, X, mask) - before).abs().amax((0, 2)) > 1e-4).all()


def test_dropout_acts_on_the_prompts_in_training_alone() -> None:
    model = _blocks(1)
    attach(model, lambda _: Tokens(Prompts(), "0", "0", dropout=0.5), X)
    assert torch.equal(run(model, X), run(model, X))
    model.train()
    assert not torch.equal(run(model, X), run(model, X))


def test_rows_of_several_adapters_share_a_batch_only_where_the_prompts_leave_at_once() -> None:
    assert Tokens(Prompts(), "0", "0").splits
    assert Tokens(Prompts(), "0", "0", overwrite=True).splits
    assert not Tokens(Prompts(), "0", "1").splits
    assert not Tokens(Prompts(), "0", "0", strip=False).splits


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 8)])
def test_a_single_layer_is_refused_because_prompts_would_change_nothing_there(layer: nn.Module) -> None:
    support = Tokens.supports(layer)
    assert not support.forward
    assert support.reason
