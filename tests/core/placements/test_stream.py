"""Stream: a transform of the residual stream, seen by the skip connection too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Point, Stream

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, run


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


def test_a_transform_at_the_blocks_input_reaches_branch_and_skip() -> None:
    torch.manual_seed(0)
    model, x, form = nn.Sequential(ResidualBlock(), ResidualBlock()).eval(), torch.randn(2, 6), nn.Linear(6, 6)
    remembered = Remembered(model, x)
    h = model[0](x)
    h = h + form(h)
    wanted = (h + model[1].fc(h)).detach()
    adapter = attach(model, lambda _: Stream(form, Point("1", "input")), x)
    assert_close(run(model, x), wanted)
    assert_every_tensor_learns(adapter, x)
    assert list(adapter.state_dict()) == ["blocks[1]/stream.weight", "blocks[1]/stream.bias"]
    tg.detach(model)
    remembered.assert_same()


def test_a_transform_behind_a_block() -> None:
    torch.manual_seed(0)
    model, x, form = nn.Sequential(ResidualBlock()).eval(), torch.randn(2, 6), nn.Linear(6, 6)
    out = model(x).detach()
    wanted = out + form(out).detach()
    attach(model, lambda _: Stream(form, Point("0", "output")), x)
    assert_close(run(model, x), wanted)
