"""Sequential: h = h + form(h), or h = form(h), at the input or output of a module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Layout, Point, Sequential

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, disturb, run


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("side", ["input", "output"])
def test_the_tensor_is_transformed_where_the_point_says(side: str, skip: bool) -> None:
    torch.manual_seed(0)
    model, x, form = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).eval(), torch.randn(2, 6), nn.Linear(6, 6)
    remembered = Remembered(model, x)
    layer, own = (model[0].weight, model[0].bias), (form.weight, form.bias)
    h = x if side == "input" else F.linear(x, *layer)
    h = F.linear(h, *own) + (h if skip else 0)
    wanted = torch.tanh(F.linear(h, *layer) if side == "input" else h).detach()
    adapter = attach(model, lambda _: Sequential(form, Point("0", side), skip=skip), x)
    assert_close(run(model, x), wanted)
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


def test_the_rest_of_the_arguments_and_outputs_is_passed_on() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(x, key, value=key)

    model, x, key, form = Root().eval(), torch.randn(2, 3, 4), torch.randn(2, 5, 4), nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        form.weight.copy_(torch.eye(4))
        wanted = model(2 * x, key)
    attach(model, lambda _: Sequential(form, Point("attention", "input")), x, key)
    with torch.no_grad():
        found = model(x, key)
    assert_close(found[0], wanted[0])
    assert_close(found[1], wanted[1])


def test_a_spatial_form_sees_tokens_as_a_map() -> None:
    torch.manual_seed(0)
    model, x, form = nn.Sequential(nn.Linear(3, 3)).eval(), torch.randn(2, 6, 3), nn.Conv2d(3, 3, 3, padding=1)
    plain = run(model, x)
    adapter = attach(model, lambda _: Sequential(form, Point("0", "output"), layout=Layout("NLC", 0, (2, 3))), x)
    grid = form(plain.reshape(2, 2, 3, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(2, 6, 3)
    assert_close(run(model, x), (plain + grid).detach())
    assert_every_tensor_learns(disturb(adapter), x)
