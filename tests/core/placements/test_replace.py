"""Replace: the adapter's own module in place of one of the backbone's."""

from __future__ import annotations

import torch
from torch import nn

import torchgraft as tg
from torchgraft.core.placements import Replace

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, run


def test_the_adapters_module_runs_and_the_backbones_stays_untouched() -> None:
    torch.manual_seed(0)
    model, x, form = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(2, 4), nn.Linear(6, 5)
    remembered = Remembered(model, x)
    old = model[1]
    wanted = form(model[0](x)).detach()
    adapter = attach(model, lambda _: Replace("1", form), x)
    assert_close(run(model, x), wanted)
    assert model[1] is old
    assert old.out_features == 3
    assert_every_tensor_learns(adapter, x)
    tg.activate(model, None)
    assert torch.equal(run(model, x), remembered.output)
    tg.detach(model)
    remembered.assert_same()


def test_one_module_may_stand_in_for_two_and_is_stored_once() -> None:
    torch.manual_seed(0)
    model, x, form = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), nn.Linear(4, 4)
    wanted = form(form(x)).detach()
    adapter = attach(model, lambda _: [Replace("0", form), Replace("1", form)], x)
    assert_close(run(model, x), wanted)
    assert adapter.num_parameters() == 20
    assert sorted(adapter.state_dict()) == ["0/replace.bias", "0/replace.weight"]


def test_every_argument_reaches_the_new_module() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, factor: int = 1) -> torch.Tensor:
            return factor * super().forward(x)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, factor=3)

    model, x, form = Root(), torch.randn(2, 4), Scaled(4, 4)
    attach(model, lambda _: Replace("inner", form), x)
    assert_close(run(model, x), 3 * nn.functional.linear(x, form.weight, form.bias).detach())
