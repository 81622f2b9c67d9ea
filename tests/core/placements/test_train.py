"""Train: the adapter's own copy of existing parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Train

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, disturb, run


def _train(path: str, *names: str):
    def make(anatomy: tg.Anatomy) -> Train:
        held = anatomy.module(path)._parameters
        return Train(path, {n: held[n] for n in names or held if held[n] is not None})

    return make


LAYERS = {
    "linear": (lambda: nn.Linear(4, 4), (2, 4)),
    "conv": (lambda: nn.Conv2d(4, 4, 3), (2, 4, 5, 5)),
    "layernorm": (lambda: nn.LayerNorm(4), (2, 4)),
    "batchnorm": (lambda: nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "prelu": (lambda: nn.PReLU(4), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_computes_with_the_copies_and_keeps_its_own_values(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model, x = nn.Sequential(make()).eval(), torch.randn(shape)
    remembered, reference = Remembered(model, x), copy.deepcopy(model)
    adapter = attach(model, _train("0"), x)
    assert torch.equal(run(model, x), remembered.output), "starts as the backbone"
    disturb(adapter)
    for name, value in adapter.state_dict().items():
        setattr(reference[0], name.removeprefix("0/trained."), nn.Parameter(value))
    assert_close(run(model, x), run(reference, x))
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


def test_a_few_named_parameters_can_be_copied() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    weight = model[0].weight
    adapter = attach(model, _train("0", "bias"), x)
    assert list(adapter.state_dict()) == ["0/trained.bias"]
    assert model[0].weight is weight
    assert model[0].bias is next(adapter.parameters())


def test_every_adapter_has_its_own_copy() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    plain = run(model, x)
    one = disturb(attach(model, _train("0"), x, name="one"), seed=1)
    two = attach(model, _train("0"), x, name="two")
    assert torch.equal(run(model, x), plain), "the second starts from the backbone, not from the first"
    disturb(two, seed=2)
    tg.activate(model, "one")
    assert_close(run(model, x), nn.functional.linear(x, *one.parameters()).detach())
    tg.activate(model, "two")
    assert_close(run(model, x), nn.functional.linear(x, *two.parameters()).detach())
    tg.activate(model, None)
    assert torch.equal(run(model, x), plain)


def test_copies_work_where_a_parent_reads_the_weights_itself() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model, x = Root().eval(), torch.randn(2, 5, 8)
    reference = copy.deepcopy(model)
    adapter = disturb(attach(model, _train("attention.out_proj"), x))
    for name, value in adapter.state_dict().items():
        reference.get_parameter(name.replace("/trained", "")).data = value
    assert_close(run(model, x), run(reference, x))
    assert_every_tensor_learns(adapter, x)


def test_the_folded_values_are_the_copies() -> None:
    model, x = nn.Sequential(nn.LayerNorm(4)), torch.randn(2, 4)
    adapter = disturb(attach(model, _train("0"), x))
    folded = adapter.placements[0][1].folded(model[0])
    assert_close(nn.functional.layer_norm(x, (4,), folded["weight"], folded["bias"]).detach(), run(model, x))


def test_recurrent_layers_are_refused_because_they_keep_a_flat_copy() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model, x = Root(), torch.randn(2, 3, 4)
    remembered = Remembered(model, x)
    with pytest.raises(tg.GraftError, match="'lstm' cannot take train: recurrent layers keep a flat copy"):
        attach(model, _train("lstm"), x)
    remembered.assert_same()
