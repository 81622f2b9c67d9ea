"""WeightDelta beside a layer: a form that follows the input gives what the changed weight would give, at less cost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import WeightDelta
from torchgraft.methods.forms.low_rank import DoRA, LowRank

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, disturb, run
from ..layer_kinds import CONVS, build, inputs

KINDS = ("linear", *CONVS)
GROUPED = [k for k in KINDS if getattr(build(k), "groups", 1) > 1]


def low_rank(layer: nn.Module, rows: slice | None = None, rank: int = 2) -> LowRank:
    weight = layer.weight if rows is None else layer.weight[rows]
    return LowRank(weight.shape, rank, 0.7)


def delta(layer: nn.Module, called: bool, **options: object) -> WeightDelta:
    return WeightDelta.on(layer, "0", low_rank(layer, options.get("rows")), called=called, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_the_layer_is_what_the_changed_weight_gives(kind: str) -> None:
    outputs = []
    for called in (False, True):
        model, x = nn.Sequential(build(kind)).eval(), inputs(kind)
        remembered = Remembered(model, x[0])
        adapter = disturb(attach(model, lambda a, c=called: delta(a.module("0"), c), x[0]))
        assert_every_tensor_learns(adapter, x[0])
        outputs.append([run(model, each) for each in x])
        tg.detach(model)
        remembered.assert_same()
    for seen, beside in zip(*outputs, strict=True):
        assert_close(beside, seen)


@pytest.mark.parametrize("kind", KINDS)
def test_it_acts_beside_every_ungrouped_layer_that_is_called_and_on_no_other(kind: str) -> None:
    layer = build(kind)
    standardised = "standardised" in kind
    assert delta(layer, True).beside == (kind not in GROUPED or standardised)
    assert delta(layer, False).beside == standardised


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4), slice(-2, None), slice(None, None)])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d", "conv3d", "weight-standardised", "timm same, stride 2"])
def test_rows_get_the_change_and_the_others_stay(kind: str, rows: slice) -> None:
    model, (x, *_) = nn.Sequential(build(kind)).eval(), inputs(kind)
    plain = run(model, x)
    adapter = disturb(attach(model, lambda a: delta(a.module("0"), True, rows=rows), x))
    assert adapter.placements[0][1].beside
    changed = (run(model, x) - plain).movedim(-1 if kind == "linear" else 1, 0)
    beside = [i for i in range(6) if i not in range(6)[rows]]
    assert all(changed[i].abs().max() > 1e-3 for i in range(6)[rows])
    assert not changed[beside].any()
    assert_every_tensor_learns(adapter, x)


@pytest.mark.parametrize("kind", [k for k in KINDS if "standardised" not in k])
def test_it_merges_to_the_same_output_and_back_to_the_bits(kind: str) -> None:
    model, (x, *_) = nn.Sequential(build(kind)).eval(), inputs(kind)
    disturb(attach(model, lambda a: delta(a.module("0"), True), x))
    apart = run(model, x)
    report = tg.merge(model, probe=x)
    assert report.complete
    assert_close(run(model, x), apart)
    tg.unmerge(model)
    assert torch.equal(run(model, x), apart)


def test_nothing_of_the_size_of_the_weight_is_made_or_kept() -> None:
    model, x = nn.Sequential(nn.Linear(64, 96)), torch.randn(2, 64)
    disturb(attach(model, lambda a: delta(a.module("0"), True), x))
    largest = 0

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not isinstance(out, nn.Parameter):
                largest = max(largest, out.numel())
            return out

    kept: list[int] = []
    with Sizes(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = model(x)
    out.sum().backward()
    assert max(largest, *kept) <= 2 * 96


def test_adapters_of_one_batch_share_the_product_of_the_layer() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)).eval(), torch.randn(4, 4)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        disturb(attach(model, lambda a: delta(a.module("0"), True), x, name=name), seed=seed)
    rows = []
    for i, name in enumerate(("a", "b", "b", "a")):
        tg.activate(model, name)
        rows.append(run(model, x[i : i + 1]))
    products = 0

    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal products
            products += func is torch.nn.functional.linear and args[1].shape == (6, 4)
            return func(*args, **(kwargs or {}))

    with tg.route(model, ["a", "b", "b", "a"]), Products():
        together = run(model, x)
    assert products == 1
    assert_close(together, torch.cat(rows))


def test_the_input_may_come_in_another_precision_than_the_form_has() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).double())

    mixed, x = Mixed().eval(), torch.randn(2, 4)
    place = lambda a: WeightDelta.on(a.module("second"), "second", low_rank(a.module("second")), called=True)  # noqa: E731
    adapter = disturb(attach(mixed, place, x))
    apart = run(mixed, x)
    assert apart.dtype == torch.float64
    assert next(adapter.parameters()).dtype == torch.float32
    tg.merge(mixed)
    assert_close(run(mixed, x), apart)


@pytest.mark.parametrize("layer", ["subclass", "parent reads"])
def test_layers_that_may_do_something_else_with_their_weight_keep_the_view(layer: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2)

    module = Doubled(4, 6) if layer == "subclass" else nn.MultiheadAttention(4, 2).out_proj
    assert not delta(module, layer == "subclass").beside


@pytest.mark.parametrize("kind", ["linear", "conv2d, stride 2", "timm same, stride 2", "transposed conv2d, stride 2"])
def test_it_compiles_and_exports_as_one_graph(kind: str) -> None:
    model, (x, *_) = nn.Sequential(build(kind)).eval(), inputs(kind)
    rows = slice(2, 4) if kind == "linear" else None
    disturb(attach(model, lambda a: delta(a.module("0"), True, rows=rows), x))
    plain = run(model, x)
    assert_close(run(torch.compile(model, backend="eager", fullgraph=True), x), plain)
    assert_close(run(torch.export.export(model, (x,)).module(), x), plain)


def test_it_can_be_mapped_over_stacked_parameters() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)).eval(), torch.randn(3, 2, 4)
    adapter = disturb(attach(model, lambda a: delta(a.module("0"), True), x[0]))
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stacked = {n: torch.stack([p * i for i in (1.0, 2.0, 3.0)]) for n, p in own.items()}
    out = torch.vmap(lambda p, one: torch.func.functional_call(model, p, (one,)))(stacked, x)
    for i in range(3):
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stacked[name][i])
        assert_close(out[i].detach(), run(model, x[i]))
    assert len(own) == len(list(adapter.parameters()))


def test_a_form_that_replaces_the_weight_is_given_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval(), torch.randn(2, 4, 5, 5)
    weight = model[0].weight
    plain = copy.deepcopy(model)
    adapter = attach(model, lambda a: WeightDelta.on(a.module("0"), "0", DoRA(weight, 2, 1.0), called=True), x)
    assert_close(run(model, x), run(plain, x), 1e-6)
    disturb(adapter)
    form = adapter.placements[0][1].form
    total = weight + (form.up @ form.down).view_as(weight)
    wanted = total * (form.magnitude / total.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    plain[0].weight = nn.Parameter(wanted.detach())
    assert_close(run(model, x), run(plain, x))
    assert_every_tensor_learns(adapter, x)


def test_the_weight_of_a_standardised_layer_cannot_be_replaced() -> None:
    layer = build("weight-standardised")
    with pytest.raises(tg.GraftError, match="standardises its weight"):
        WeightDelta.on(layer, "0", DoRA(layer.weight, 2, 1.0))
