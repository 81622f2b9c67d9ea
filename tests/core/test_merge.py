"""Merging: the merged model is the adapted one, at the cost of the plain one, and comes back to the bit."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import timm.layers as tl
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import torchgraft as tg
from torchgraft.core.folding import folding_order
from torchgraft.core.graft import existing_point
from torchgraft.core.placements import (
    Affine,
    Parallel,
    Placement,
    Point,
    Sequential,
    Train,
    WeightDelta,
    affine_for,
)

from .attaching import Placed, Remembered, assert_close, attach, disturb, run
from .layer_kinds import CONVS, LAYERS, NORMS, build, inputs


class Given(nn.Module):
    """A form without an input: it returns its one tensor."""

    def __init__(self, shape: tuple[int, ...] | torch.Size, scale: float = 0.3) -> None:
        super().__init__()
        self.value = nn.Parameter(scale * torch.randn(tuple(shape)))

    def forward(self) -> Tensor:
        return self.value


class Mix(nn.Module):
    """Something that cannot be folded."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


Part = Callable[[nn.Module, str], Placement]
PARTS: dict[str, Part] = {
    "affine": lambda m, p: affine_for(m, p),
    "input": lambda m, p: affine_for(m, p, side="input", shift=False),
    "delta": lambda m, p: WeightDelta.on(m, p, Given(m._parameters["weight"].shape)),
    "train": lambda m, p: Train(p, {n: t for n, t in m._parameters.items() if t is not None}),
}


def _merged(model: nn.Module, xs: list[Tensor], make: Any, **options: Any) -> tg.MergeReport:
    """Attach, merge, compare, unmerge, compare the bits, detach; the report."""
    remembered = Remembered(model, xs[0])
    disturb(attach(model, make, xs[0]))
    adapted = Remembered(model, *xs[:1])
    wanted = [run(model, x) for x in xs]
    report = tg.merge(model, **options)
    for x, y in zip(xs, wanted, strict=True):
        assert_close(run(model, x), y)
    tg.unmerge(model)
    adapted.assert_same()
    tg.detach(model)
    remembered.assert_same()
    return report


def _ran(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the operators that a forward runs."""
    names: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    with Watch():
        run(model, x)
    return [n for n in names if n not in ("__get__", "size", "dim") and "grad_enabled" not in n]


# -- every kind of layer --------------------------------------------------------------------------------------

SINGLE = [(part, kind) for part in PARTS for kind in (*CONVS, "linear")]
SINGLE += [("affine", kind) for kind in NORMS if "activation" not in kind] + [("train", kind) for kind in NORMS]


@pytest.mark.parametrize(("part", "kind"), SINGLE, ids=[f"{p}-{k}" for p, k in SINGLE])
def test_a_change_folds_into_every_kind_of_layer(part: str, kind: str) -> None:
    model = nn.Sequential(build(kind)).eval()
    report = _merged(model, inputs(kind), lambda a: PARTS[part](a.module("0"), "0"))
    assert report.complete
    assert report.error is not None and report.error < 1e-5
    assert [(s.address, s.merged, s.reason) for s in report.sites] == [("0", True, "")]
    assert report.sites[0].error is not None and report.sites[0].error < 1e-5
    assert report.plain == (("0",) if "standardised" in kind and part != "train" else ())


ORDERS = [order for n in (2, 4) for order in itertools.permutations(PARTS, n)]
SOME = ("linear", "scaled weight-standardised, same", "transposed conv2d, groups", "conv2d, circular")


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_several_changes_of_one_layer_fold_in_the_order_in_which_they_act(order: tuple[str, ...], kind: str) -> None:
    model = nn.Sequential(build(kind)).eval()
    report = _merged(model, inputs(kind), lambda a: [PARTS[part](a.module("0"), "0") for part in order])
    assert report.complete


@pytest.mark.parametrize("kind", ["weight-standardised", "scaled weight-standardised, same", "conv2d", "linear"])
def test_a_merged_layer_runs_one_operator_and_nothing_else(kind: str) -> None:
    model, x = nn.Sequential(build(kind)).eval(), inputs(kind)[0]
    disturb(attach(model, lambda a: [PARTS[p](a.module("0"), "0") for p in ("affine", "delta")], x))
    tg.merge(model)
    ran = [n for n in _ran(model, x) if n != "pad"]
    assert ran == ["linear" if kind == "linear" else "conv2d"]


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(4, elementwise_affine=False),
        lambda: nn.LayerNorm(4, bias=False),
        lambda: nn.BatchNorm1d(4, affine=False),
        lambda: tl.LayerNorm(4, affine=False),
    ],
)
def test_a_norm_without_an_affine_part_gets_one(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), norm()).eval()
    report = _merged(model, [torch.randn(3, 4)], lambda a: affine_for(nn.BatchNorm1d(4), "1"))
    assert report.complete
    assert report.created[-1] == "1.bias"


def test_a_scale_alone_folds_where_there_is_no_place_for_a_shift() -> None:
    model, x = nn.Sequential(nn.RMSNorm(4)), torch.randn(2, 4)
    assert _merged(model, [x], lambda a: affine_for(a.module("0"), "0", shift=False)).complete
    report = _merged(model, [x], lambda a: affine_for(a.module("0"), "0"))
    assert not report.complete
    assert report.sites[0].reason == "RMSNorm has no place for a bias that could take the shift"


def test_a_pair_between_norm_and_activation_folds_into_the_norm() -> None:
    model = nn.Sequential(build("timm batchnorm with activation")).eval()
    make = lambda a: affine_for(a.module("0"), "0", before_act=True)  # noqa: E731
    assert _merged(model, inputs("timm batchnorm with activation"), make).complete


def test_a_pair_between_convolution_and_batchnorm_folds_into_the_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    statistics = model[1].running_mean
    report = _merged(model, [x], lambda a: affine_for(a.module("0"), "0"))
    assert report.complete
    assert report.created == ("0.bias",)
    assert model[1].running_mean is statistics


def test_a_shift_of_the_input_that_meets_zero_padding_stays_and_says_why() -> None:
    model = nn.Sequential(build("conv2d")).eval()
    report = _merged(model, inputs("conv2d"), lambda a: affine_for(a.module("0"), "0", side="input"))
    assert "zeros are padded behind the shift" in report.sites[0].reason


# -- weights that others read ---------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_an_in_projection_fold(bias: bool) -> None:
    torch.manual_seed(0)
    model, names = Attention(bias).eval(), ("in_proj_weight", "in_proj_bias")

    def make(_: tg.Anatomy) -> list[Placement]:
        delta = WeightDelta("attention", Given((8, 4)), parameter=names[0], rows=slice(4, 12))
        pair = [nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))]
        out = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))]
        return [
            delta,
            Affine("attention", *pair, axis=-1, through=names),
            Affine("attention.out_proj", *out, axis=-1, through=("weight", "bias")),
        ]

    report = _merged(model, [torch.randn(2, 5, 4)], make)
    assert report.complete
    assert report.created == (() if bias else ("attention.in_proj_bias", "attention.out_proj.bias"))


def test_rows_of_a_fused_qkv_fold() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12, bias=False))

    def make(a: tg.Anatomy) -> list[Placement]:
        linear = a.module("0")
        return [
            WeightDelta("0", Given((4, 4)), rows=slice(0, 4)),
            WeightDelta("0", Given((4, 4)), rows=slice(8, 12)),
            affine_for(linear, "0", rows=slice(4, 12), shift=False),
        ]

    assert _merged(model, [torch.randn(2, 4)], make).complete


def test_a_shared_module_is_folded_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = _merged(model, [torch.randn(2, 4)], lambda a: [PARTS[p](layer, "0") for p in ("affine", "delta")])
    assert report.complete


def test_a_tied_weight_changes_only_where_it_was_adapted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embedding(ids))

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(4)[None]
    for home in ("out", "embedding"):
        assert _merged(model, [ids], lambda _, h=home: WeightDelta(h, Given((9, 4)))).complete
    disturb(attach(model, lambda _: WeightDelta("out", Given((9, 4))), ids))
    shared = model.embedding.weight
    tg.merge(model)
    assert model.embedding.weight is shared
    assert model.out.weight is not shared
    tg.unmerge(model)
    assert model.out._parameters["weight"] is shared


def test_tied_embeddings_of_t5_keep_apart() -> None:
    torch.manual_seed(0)
    config = hf.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    model, ids = hf.T5ForConditionalGeneration(config).eval(), torch.arange(6)[None]
    assert model.lm_head.weight is model.shared.weight
    adapter = tg.attach(model, Placed(lambda a: PARTS["delta"](a.module("lm_head"), "lm_head")))
    disturb(adapter)
    call = lambda: model(input_ids=ids, decoder_input_ids=ids).logits.detach()  # noqa: E731
    wanted, embedded = call(), model.shared.weight.clone()
    tg.merge(model)
    assert_close(call(), wanted)
    assert torch.equal(model.shared.weight, embedded)


# -- what stays -----------------------------------------------------------------------------------------------


def _beside(early: bool = False) -> Parallel:
    return Parallel(Mix(), Point("0", "input"), Point("0", "output"), early=early)


STAYS: dict[str, tuple[Callable[[nn.Module], list[Placement]], list[bool], str]] = {
    "behind a branch": (lambda m: [_beside(), affine_for(m, "0")], [False, False], "parallel, which stays"),
    "before a branch": (lambda m: [affine_for(m, "0"), _beside()], [True, False], ""),
    "a delta beside a branch": (lambda m: [_beside(), PARTS["delta"](m, "0")], [False, True], ""),
    "an input that a branch reads too": (
        lambda m: [PARTS["input"](m, "0"), _beside()],
        [False, False],
        "reads the layer's input too",
    ),
    "a change of the input ahead": (
        lambda m: [Sequential(Mix(), Point("0", "input")), PARTS["input"](m, "0")],
        [False, True],
        "",
    ),
    "a change of the input behind": (
        lambda m: [PARTS["input"](m, "0"), Sequential(Mix(), Point("0", "input"))],
        [False, False],
        "sequential, which stays, stands between",
    ),
    "behind a branch from before the layer": (
        lambda m: [_beside(early=True), affine_for(m, "0")],
        [False, False],
        "parallel, which stays",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stands_behind_something_that_stays_stays_too(case: str) -> None:
    make, merged, reason = STAYS[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    report = _merged(model, [torch.randn(3, 4)], lambda a: make(a.module("0")))
    assert [s.merged for s in report.sites] == merged
    assert all(s.reason for s in report.sites if not s.merged)
    assert any(reason in s.reason for s in report.sites)
    assert not report.complete


def test_a_pair_behind_a_block_stays_and_the_rest_folds() -> None:
    model = timm.create_model("test_convnext", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    adapter = disturb(tg.attach(model, "ssf", example=((x,), {})), 0.05)
    report = tg.merge(model)
    stays = [s for s in report.sites if not s.merged]
    assert [s.address for s in stays] == ["stages[3].blocks[1]"]
    assert "has no weight per output channel" in stays[0].reason
    assert len(report.sites) == len(adapter.placements)
    assert "no: " in str(report)


def test_a_layer_that_does_not_use_its_weight_as_it_is_keeps_the_adapter() -> None:
    """Some norms multiply by ``1 + weight``: nobody can know by the layer's kind."""

    class ZeroCentredLayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)

    class CosineLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, F.normalize(self.weight, dim=1), self.bias)

    for layer in (ZeroCentredLayerNorm(4), CosineLinear(4, 4)):
        report = _merged(nn.Sequential(layer), [torch.randn(3, 4)], lambda a: affine_for(a.module("0"), "0"))
        assert not report.complete
        assert report.sites[0].reason


def test_a_quantised_or_sharded_weight_keeps_the_adapter() -> None:
    class Sharded(Tensor):
        """Stands for the tensor classes of distributed and of quantised weights."""

    weight = torch.randn(4, 4)
    kinds = {
        "weight is quantised (int8)": nn.Parameter((weight * 100).to(torch.int8), requires_grad=False),
        "weight is a Sharded, not a plain tensor (quantised or sharded)": nn.Parameter(weight.as_subclass(Sharded)),
    }
    for reason, parameter in kinds.items():
        model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
        attach(model, lambda a: affine_for(a.module("0"), "0"), x)
        model[0]._parameters["weight"] = parameter
        point = existing_point(model[0])
        assert point is not None
        order, stays = folding_order(model[0], point, "default")
        assert order == []
        assert list(stays.values()) == [reason]


# -- all or nothing -------------------------------------------------------------------------------------------


def _two() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)


def test_a_fold_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _two()
    disturb(attach(model, lambda a: [affine_for(a.module(p), p) for p in ("0", "2")], x))
    seen, original = [], Affine.folded

    def fails_the_second_time(self: Affine, module: nn.Module) -> dict[str, Tensor]:
        seen.append(module)
        if len(seen) == 2:
            raise MemoryError("no room")
        return original(self, module)

    remembered = Remembered(model, x)
    monkeypatch.setattr(Affine, "folded", fails_the_second_time)
    with pytest.raises(MemoryError):
        tg.merge(model)
    remembered.assert_same()
    monkeypatch.undo()
    tg.merge(model)
    tg.unmerge(model)
    remembered.assert_same()


def test_an_error_above_the_tolerance_leaves_the_model_and_the_active_adapter_as_they_were() -> None:
    model, x = _two()
    disturb(attach(model, lambda a: affine_for(a.module("0"), "0"), x, name="first"))
    disturb(attach(model, lambda a: affine_for(a.module("2"), "2"), x, name="second"))
    remembered = Remembered(model, x)
    with pytest.raises(tg.GraftError, match=r"merging 'first' changes the output by .*tolerance -1.0e\+00"):
        tg.merge(model, "first", tolerance=-1.0)
    assert tg.core.active(model) == "second"
    remembered.assert_same()


def test_mistakes_are_named() -> None:
    model, x = _two()
    with pytest.raises(tg.GraftError, match="nothing is attached"):
        tg.merge(model)
    with pytest.raises(tg.GraftError, match="nothing is merged"):
        tg.unmerge(model)
    attach(model, lambda a: affine_for(a.module("0"), "0"), x)
    with pytest.raises(tg.GraftError, match="no adapter 'other'; name one of default"):
        tg.merge(model, "other")
    with tg.route(model, ["default", None]), pytest.raises(tg.GraftError, match=r"inside route\(\)"):
        tg.merge(model)
    tg.merge(model)
    with pytest.raises(tg.GraftError, match="merged already; unmerge first"):
        tg.merge(model)
    with pytest.raises(tg.GraftError, match="unmerge first"):
        tg.activate(model, None)
    with pytest.raises(tg.GraftError, match="unmerge first"):
        tg.detach(model)


def test_weights_without_values_are_not_merged() -> None:
    model, x = _two()
    attach(model, lambda a: affine_for(a.module("0"), "0"), x)
    model.to("meta")
    with pytest.raises(tg.GraftError, match="on the meta device"):
        tg.merge(model)


# -- what else people do with a model -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv2d, two groups", "weight-standardised", "layernorm"])
def test_lower_precision_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    exact = nn.Sequential(build(kind)).eval()
    low = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    make = lambda a: [affine_for(a.module("0"), "0") for _ in range(3)]  # noqa: E731
    states = []
    for model in (low, exact):
        x = inputs(kind)[0].to(next(model.parameters()).dtype)
        adapter = attach(model, make, x)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                moved = parameter + 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(moved.to(dtype))
        report = tg.merge(model)
        assert report.complete
        states.append({k: v for k, v in model.state_dict().items() if "torchgraft" not in k.split(".")})
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert value.dtype == dtype
        wanted = states[1][key].to(dtype)
        if "standardised" in kind:  # computed in another order of summing
            assert_close(value.float(), wanted.float(), 2e-2)
        else:
            assert torch.equal(value, wanted), key


def test_a_compiled_model_can_be_merged() -> None:
    torch.compiler.reset()
    model, x = _two()
    disturb(attach(model, lambda a: [affine_for(a.module(p), p) for p in ("0", "2")], x))
    compiled = torch.compile(model, backend="eager")
    model.compile(backend="eager")
    wanted = run(model, x)
    assert torch.equal(run(compiled, x), wanted)
    assert tg.merge(compiled).complete
    for form in (model, compiled):
        assert_close(run(form, x), wanted)
    tg.unmerge(compiled)
    for form in (model, compiled):
        assert torch.equal(run(form, x), wanted)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_merged_model_can_be_unmerged(how: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(tl.StdConv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False)).eval()
    x = torch.randn(2, 3, 6, 6)
    disturb(tg.attach(model, "ssf", example=((x,), {})))
    apart = run(model, x)
    tg.merge(model)
    merged = run(model, x)
    other = how(model)
    assert torch.equal(run(other, x), merged)
    tg.unmerge(other)
    assert torch.equal(run(other, x), apart)
    assert torch.equal(run(model, x), merged)


def test_what_comes_back_follows_a_model_that_was_cast_meanwhile() -> None:
    model, x = _two()
    disturb(attach(model, lambda a: affine_for(a.module("0"), "0"), x))
    wanted = run(model, x)
    tg.merge(model)
    model.double()
    tg.unmerge(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert_close(run(model, x.double()).float(), wanted)


def test_memory_layout_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    disturb(attach(model, lambda a: affine_for(a.module("0"), "0"), x))
    tg.merge(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_merging_disturbs_no_mode_and_no_random_numbers() -> None:
    model = nn.Sequential(tl.StdConv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 1)).train()
    disturb(tg.attach(model, "ssf", example=((torch.randn(1, 3, 6, 6),), {})))
    model[2].eval()
    modes, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    tg.merge(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


def test_an_adapter_can_be_merged_that_is_not_the_active_one() -> None:
    model, x = _two()
    disturb(attach(model, lambda a: affine_for(a.module("0"), "0"), x, name="first"))
    first = run(model, x)
    disturb(attach(model, lambda a: affine_for(a.module("2"), "2"), x, name="second"), seed=1)
    tg.merge(model, "first")
    assert tg.core.active(model) == "first"
    assert_close(run(model, x), first)
    tg.unmerge(model)
    assert torch.equal(run(model, x), first)


# -- the state of a merged model ------------------------------------------------------------------------------


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if "torchgraft" not in k.split(".")}


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_resnet", "test_convnext"])
def test_a_plain_model_loads_the_merged_weights(name: str) -> None:
    """The keys are those of the plain model, and those that the report names: a bias where there was none."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    side = model.pretrained_cfg["input_size"][1] if "vit" in name else 64
    x = torch.randn(1, 3, side, side)
    exclude = ["stages[3].blocks[1]"] if "convnext" in name else None  # the pair that stays
    disturb(tg.attach(model, "ssf", example=((x,), {}), exclude=exclude), 0.05)
    wanted = run(model, x)
    report = tg.merge(model)
    assert report.plain == ()
    twin = timm.create_model(name, num_classes=3).eval()
    state = _plain_state(model)
    assert state.keys() - twin.state_dict().keys() == set(report.created)
    assert bool(report.created) == (name in ("test_resnet", "test_efficientnet"))
    for key in report.created:
        path, _, leaf = key.rpartition(".")
        twin.get_submodule(path).register_parameter(leaf, nn.Parameter(torch.zeros_like(state[key])))
    twin.load_state_dict(state)
    assert_close(run(twin, x), wanted)


@pytest.mark.parametrize("padding", [None, "same"])
def test_the_standardised_convolutions_of_bit_in_transformers_become_plain(padding: str | None) -> None:
    torch.manual_seed(0)
    config = hf.BitConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8, num_labels=3, global_padding=padding
    )
    model = hf.BitForImageClassification(config).eval()
    disturb(tg.attach(model, "ssf"), 0.05)
    images = [torch.randn(1, 3, 64, 64), torch.randn(1, 3, 63, 49)]
    wanted = [run(model, x) for x in images]
    report = tg.merge(model)
    assert report.complete
    assert len(report.plain) == sum("Standardized" in type(m).__name__ for m in model.modules())
    for x, y in zip(images, wanted, strict=True):
        assert_close(run(model, x), y)
    assert not any("batch_norm" in n for n in _ran(model, images[0]))
    tg.unmerge(model)
    assert all(torch.equal(run(model, x), y) for x, y in zip(images, wanted, strict=True))


def test_a_report_is_plain_data_and_a_table() -> None:
    model = nn.Sequential(tl.StdConv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False)).eval()
    x = torch.randn(2, 3, 6, 6)
    disturb(attach(model, lambda a: [affine_for(a.module(p), p) for p in ("0", "2")], x))
    report = tg.merge(model)
    text = str(report)
    assert "0     affine     yes  error" in text
    assert "as a plain convolution" in text
    assert "new parameters: 0.bias, 2.bias" in text
    assert "output error on the probe: " in text
    assert set(report.to_dict()) == {"sites", "error", "complete", "created", "plain"}
    assert report.to_dict()["sites"][0]["address"] == "0"


def test_every_kind_of_layer_is_among_those_tested() -> None:
    assert {k for _, k in SINGLE} | {"timm batchnorm with activation", "transformer encoder layer"} == set(LAYERS)
