"""WeightDelta: a change of the weight, wherever it is read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import WeightDelta

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, run


class Delta(nn.Module):
    """The simplest form: the delta itself."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(0.3 * torch.randn(shape))

    def forward(self) -> Tensor:
        return self.value


class AttentionHost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_the_layer_computes_with_the_sum() -> None:
    torch.manual_seed(0)
    model, x, form = nn.Sequential(nn.Linear(4, 6)).eval(), torch.randn(2, 4), Delta(6, 4)
    remembered = Remembered(model, x)
    weight, bias = model[0].weight, model[0].bias
    adapter = attach(model, lambda _: WeightDelta("0", form), x)
    assert_close(run(model, x), F.linear(x, weight + form.value, bias).detach())
    assert torch.equal(model[0].weight, weight + form.value), "whoever reads the weight sees the sum"
    assert model[0]._parameters["weight"] is weight
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    assert model[0].weight is weight
    remembered.assert_same()


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4), slice(4, 6), slice(-2, None), slice(None, 3)])
def test_rows_confine_the_delta_to_a_part_of_the_weight(rows: slice) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6)).eval(), torch.randn(2, 4)
    form = Delta(len(range(6)[rows]), 4)
    wanted = model[0].weight.detach().clone()
    wanted[rows] += form.value.detach()
    bias = model[0].bias
    adapter = attach(model, lambda _: WeightDelta("0", form, rows=rows), x)
    assert torch.equal(model[0].weight, wanted)
    assert_close(run(model, x), F.linear(x, wanted, bias).detach())
    assert_every_tensor_learns(adapter, x)


def test_two_deltas_on_one_weight_add_up() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6)).eval(), torch.randn(2, 4)
    query, value, weight = Delta(2, 4), Delta(2, 4), model[0].weight
    make = lambda _: [WeightDelta("0", query, rows=slice(0, 2)), WeightDelta("0", value, rows=slice(4, 6))]  # noqa: E731
    adapter = attach(model, make, x)
    wanted = weight + torch.cat([query.value, torch.zeros(2, 4), value.value])
    assert torch.equal(model[0].weight, wanted)
    assert_every_tensor_learns(adapter, x)


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "groups": 2}, {"dilation": 2}])
def test_on_a_standardised_convolution_the_delta_is_added_to_the_standardised_weight(
    kind: type[nn.Module], options: dict[str, int]
) -> None:
    torch.manual_seed(0)
    conv, x = kind(4, 6, 3, **options), torch.randn(2, 4, 7, 8)
    model = nn.Sequential(conv).eval()
    remembered = Remembered(model, x)
    form = Delta(*conv.weight.shape)
    # A convolution is linear in its weight: conv(x, W_hat + D) = conv(x, W_hat) + conv(x, D).
    beside = nn.Conv2d(4, 6, 3, bias=False, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
                       groups=conv.groups)  # fmt: skip
    beside.weight = form.value
    wanted = (run(model, x) + beside(x)).detach()
    adapter = attach(model, lambda a: WeightDelta.on(a.module("0"), "0", form), x)
    assert_close(run(model, x), wanted)
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize("rows", [slice(0, 1), slice(2, 4)])
def test_rows_of_a_standardised_convolution_are_right_or_refused(rows: slice) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(StdConv2d(3, 4, 3)).eval(), torch.randn(2, 3, 7, 7)
    form = Delta(len(range(4)[rows]), 3, 3, 3)
    plain = run(model, x)
    try:
        attach(model, lambda a: WeightDelta.on(a.module("0"), "0", form, rows=rows), x)
    except tg.GraftError:
        return
    changed = run(model, x) - plain
    assert_close(changed[:, rows], F.conv2d(x, form.value, padding=1).detach())
    assert not changed[:, [c for c in range(4) if c not in range(4)[rows]]].any()


@pytest.mark.parametrize("gradients", [False, True])
def test_the_weights_of_an_attention_that_its_parent_reads_are_changed_too(gradients: bool) -> None:
    torch.manual_seed(0)
    model, x = AttentionHost().eval(), torch.randn(2, 5, 8)
    remembered = Remembered(model, x)
    out, projection = Delta(8, 8), Delta(8, 8)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.attention.out_proj.weight += out.value
        reference.attention.in_proj_weight[8:16] += projection.value
    adapter = attach(
        model,
        lambda _: [
            WeightDelta("attention.out_proj", out),
            WeightDelta("attention", projection, parameter="in_proj_weight", rows=slice(8, 16)),
        ],
        x,
    )
    with torch.set_grad_enabled(gradients):
        assert_close(model(x).detach(), reference(x).detach())
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


def test_an_embedding_looks_up_the_sum() -> None:
    torch.manual_seed(0)
    model, form = nn.Sequential(nn.Embedding(7, 4)), Delta(7, 4)
    ids = torch.tensor([[0, 3, 3, 6]])
    wanted = (model[0].weight[ids] + form.value[ids]).detach()
    attach(model, lambda _: WeightDelta("0", form), ids)
    assert_close(run(model, ids), wanted)


def test_a_layer_whose_weight_is_computed_by_a_parametrisation_is_right_or_refused() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), torch.randn(2, 4)
    form, weight, bias = Delta(4, 4), model[0].weight.detach(), model[0].bias
    try:
        attach(model, lambda _: WeightDelta("0", form), x)
    except tg.GraftError:
        return
    assert_close(run(model, x), F.linear(x, weight + form.value, bias).detach())


def test_weights_that_do_not_reach_the_output_are_refused_with_their_name() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, x = Unused().eval(), torch.randn(2, 4)
    remembered = Remembered(model, x)
    with pytest.raises(tg.GraftError, match="'unused' do not reach the output"):
        attach(model, lambda _: WeightDelta("unused", Delta(4, 4)), x)
    remembered.assert_same()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "transposed conv": lambda: nn.ConvTranspose2d(4, 6, 3),
}


@pytest.mark.parametrize("rows", [None, slice(1, 3)])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_folded_weight_gives_the_adapted_output(kind: str, rows: slice | None) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    copied, x = copy.deepcopy(layer), torch.randn(2, 4) if kind == "linear" else torch.randn(2, 4, 5, 5)
    shape = list(layer.weight.shape)
    shape[0] = shape[0] if rows is None else 2
    model, form = nn.Sequential(layer), Delta(*shape)
    adapter = attach(model, lambda _: WeightDelta("0", form, rows=rows), x)
    wanted = run(model, x)
    folded = adapter.placements[0][1].folded(layer)
    assert set(folded) == {"weight"}
    copied.weight = nn.Parameter(folded["weight"])
    assert_close(run(copied, x), wanted)


def test_layers_without_a_kernel_are_refused_with_a_reason() -> None:
    for layer in (nn.LayerNorm(4), nn.BatchNorm2d(4), nn.ReLU()):
        support = WeightDelta.supports(layer)
        assert not support.forward
        assert type(layer).__name__ in support.reason
