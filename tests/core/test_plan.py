"""Plans: what is foretold is what attaching then really adds."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Affine, Parallel, Point, Train, WeightDelta

from .attaching import Placed, Remembered, disturb, run

# Backbones of the acceptance test, at a size that runs in a moment.
MODELS = {"resnet18": 64, "convnext_atto": 64}
SMALL = {"test_resnet": 64, "test_convnext": 64, "test_efficientnet": 64, "test_vit": 160}
METHODS = ["conv-adapter", "bitfit", "full", "norm-tuning", "linear", "conv-adapter[reduction=8] + bitfit"]


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def _kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that a real forward keeps, the model's own tensors and the input left out."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # holding it keeps the address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.requires_grad
    return sum(size for size, _ in kept.values())


# -- parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SMALL)
def test_sites_and_parameters_are_those_that_attaching_adds(name: str, method: str, classes: int | None) -> None:
    if method == "linear" and classes is None:
        pytest.skip("adds a head and nothing else")
    model = _model(name)
    plan = tg.plan(model, method, SMALL[name], num_classes=classes)
    adapter = tg.attach(model, method, num_classes=classes)
    rows = {}
    for prefix, placement in adapter.placements:
        count = sum(p.numel() for p in placement.parameters())
        if prefix != "head" and count:
            rows.setdefault((placement.home, placement.kind), []).append(count)
    planned: dict[tuple[str, str], list[int]] = {}
    for site in plan.sites:
        planned.setdefault((site.path, site.kind), []).append(site.parameters)
    assert planned == rows
    assert plan.parameters == sum(p.numel() for n, p in adapter.named_parameters() if "/" in n)
    assert plan.head_parameters == (5 * (model.num_features + 1) if classes else 0)
    assert plan.parameters == adapter.num_parameters()
    assert plan.head_parameters == adapter.head_parameters()


def test_the_backbone_is_counted_without_its_classifier() -> None:
    model = _model("test_resnet")
    plan = tg.plan(model, "conv-adapter", 64)
    classifier = sum(p.numel() for p in model.fc.parameters())
    assert plan.backbone_parameters == sum(p.numel() for p in model.parameters()) - classifier
    assert plan.percent == pytest.approx(100 * plan.parameters / plan.backbone_parameters)


@pytest.mark.parametrize("batchnorm", ["frozen", "adapt"])
def test_the_file_is_as_large_as_foretold(batchnorm: str, tmp_path) -> None:
    model = _model("test_resnet")
    plan = tg.plan(model, "conv-adapter", 64, num_classes=5, batchnorm=batchnorm)
    tg.attach(model, "conv-adapter", num_classes=5, batchnorm=batchnorm).save(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    assert plan.file_bytes == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)


def test_shared_parameters_count_once() -> None:
    class Shared(nn.Module):
        def __init__(self, factor: nn.Parameter) -> None:
            super().__init__()
            self.factor = factor

        def forward(self) -> Tensor:
            return self.factor

    def make(_: tg.Anatomy) -> list[WeightDelta]:
        factor = nn.Parameter(torch.randn(4, 4))
        return [WeightDelta("0", Shared(factor)), WeightDelta("1", Shared(factor))]

    model, example = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ((torch.randn(2, 4),), {})
    plan = tg.plan(model, Placed(make), example=example)
    assert plan.parameters == 16
    assert tg.attach(model, Placed(make), example=example).num_parameters() == 16


# -- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["conv-adapter", "full", "bitfit"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_kept_for_the_backward_are_those_of_the_real_model(name: str, method: str) -> None:
    model = _model(name)
    plan = tg.plan(model, method, MODELS[name], num_classes=5)
    tg.attach(model, method, num_classes=5, lean=False)
    assert plan.input == (1, 3, 64, 64)
    assert plan.saved["off"] == pytest.approx(_kept_for_backward(model, torch.randn(plan.input)), rel=0.01)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_the_bytes_are_right_for_other_families_too(name: str) -> None:
    model = _model(name)
    plan = tg.plan(model, "conv-adapter", SMALL[name], lean=False)
    tg.attach(model, "conv-adapter", lean=False)
    assert plan.lean == "off"
    assert plan.saved_bytes == pytest.approx(_kept_for_backward(model, torch.randn(plan.input)), rel=0.02)


LEVELS = ("off", "exact", "recompute", "checkpoint", "compact")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if method == often or name == "test_resnet" else pytest.mark.slow)
        for method in ("conv-adapter", "ssf", "lora", "bitfit")
        for name, often in zip(SMALL, ("", "lora", "conv-adapter", "ssf"), strict=True)
    ],
)
def test_every_level_keeps_in_a_real_training_step_what_the_plan_foretells(name: str, method: str) -> None:
    size = SMALL[name]
    plan = tg.plan(_model(name), method, size, num_classes=5, batch=3)
    assert (plan.batch, tuple(plan.saved)) == (3, LEVELS)
    for level in LEVELS:
        model = _model(name)
        tg.attach(model, method, num_classes=5, lean=level)
        kept = _kept_for_backward(model.train(), torch.randn(3, 3, size, size))
        assert plan.saved[level] == pytest.approx(kept, rel=0.05), level
    assert plan.saved["exact"] < plan.saved["off"]
    assert plan.saved_bytes == plan.saved["exact"]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_full_fine_tuning_is_counted_beside_the_method(name: str) -> None:
    plan = tg.plan(_model(name), "bitfit", 64, batch=2)
    model = _model(name).train().requires_grad_(True)
    assert plan.saved_full == pytest.approx(_kept_for_backward(model, torch.randn(2, 3, 64, 64)), rel=0.01)
    assert "lean exact" in str(plan) and "full fine-tuning" in str(plan)


def test_norms_that_are_not_folded_keep_more_where_nothing_is_lean() -> None:
    folded, apart = (tg.plan(_model("test_resnet"), "conv-adapter", 64, fold=fold, batch=8) for fold in (True, False))
    assert folded.saved["off"] < apart.saved["off"]


def test_a_wrong_level_and_a_wrong_batch_are_one_line() -> None:
    with pytest.raises(tg.GraftError, match="did you mean 'compact'"):
        tg.plan(_model("test_resnet"), "bitfit", 64, lean="compakt")
    with pytest.raises(tg.GraftError, match="batch=0 was given"):
        tg.plan(_model("test_resnet"), "bitfit", 64, batch=0)


def test_what_is_foretold_belongs_to_the_model_as_it_was_planned() -> None:
    model = _model("test_resnet")
    wanted, plan = tg.plan(model, "bitfit", 64).saved_bytes, tg.plan(model, "bitfit", 64)
    tg.attach(model, "full")
    state = torch.get_rng_state()
    assert plan.saved_bytes == wanted
    assert torch.equal(torch.get_rng_state(), state)


# -- arithmetic -----------------------------------------------------------------------------------------


def test_the_operations_are_those_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2))
    example = ((torch.randn(1, 3, 16, 16),), {})
    form = lambda: nn.Sequential(nn.Conv2d(8, 2, 3, stride=2, padding=1, groups=2), nn.Conv2d(2, 8, 1))  # noqa: E731
    method = Placed(lambda _: Parallel(form(), Point("2", "input"), Point("2", "output")))
    plan = tg.plan(model, method, example=example)
    stem, conv = 16 * 16 * 8 * 3 * 9, 8 * 8 * 8 * 4 * 9  # multiply-adds: outputs x channels read x taps
    branch = 8 * 8 * 2 * 4 * 9 + 8 * 8 * 8 * 2
    assert plan.flops == 2 * (stem + conv)
    assert plan.flops_added == 2 * branch
    assert plan.parameters == (2 * 4 * 9 + 2) + (2 * 8 + 8)


def test_a_head_of_other_size_changes_the_operations() -> None:
    model = _model("test_resnet")
    plan = tg.plan(model, "linear", 64, num_classes=3)
    assert plan.flops_added == 2 * model.num_features * (3 - 10)


# -- without a trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_planning_changes_nothing(training: bool) -> None:
    model = _model("test_resnet").train(training)
    remembered = Remembered(model)
    state = torch.get_rng_state()
    tg.plan(model, "conv-adapter + full", 64, num_classes=5, batchnorm="train")
    assert torch.equal(torch.get_rng_state(), state), "not even the random numbers"
    remembered.assert_same()
    assert tg.adapters(model) == {}


@pytest.mark.parametrize("active", ["one", None])
@pytest.mark.parametrize("method", ["conv-adapter", "full", "pad-prompt"])
def test_an_adapted_model_is_planned_like_the_plain_one(method: str, active: str | None) -> None:
    x = torch.randn(1, 3, 160, 160)  # the size that the frame of pad-prompt is made for
    plain = tg.plan(_model("test_resnet"), "conv-adapter + bitfit", 64, num_classes=5)
    model = _model("test_resnet")
    disturb(tg.attach(model, method, name="one", num_classes=7))
    tg.activate(model, active)
    remembered = Remembered(model, x)
    assert tg.plan(model, "conv-adapter + bitfit", 64, num_classes=5) == plain
    remembered.assert_same()
    assert tg.active(model) == active


def test_whatever_attaching_refuses_planning_refuses() -> None:
    model = _model("test_resnet")
    for spec, options in [
        ("conv-adaptor", {}),
        ("conv-adapter", {"include": "nowhere"}),
        ("conv-adapter", {"batchnorm": "thawed"}),
    ]:
        with pytest.raises(tg.GraftError):
            tg.plan(model, spec, 64, **options)
    with pytest.raises(tg.GraftError, match="no classifier to replace"):
        tg.plan(timm.create_model("test_resnet", features_only=True), "conv-adapter", 64, num_classes=5)


def test_a_site_that_never_runs_is_refused_when_planning_too() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    method = Placed(lambda _: Affine("unused", nn.Parameter(torch.ones(4)), None, axis=-1))
    with pytest.raises(tg.GraftError, match="'unused' is never called"):
        tg.plan(Unused(), method, example=((torch.randn(1, 4),), {}))


def test_a_placement_that_a_layer_cannot_take_is_refused_even_where_nothing_could_be_run() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
            return self.lstm(x, state)[0]

    method = Placed(lambda a: Train("lstm", dict(a.module("lstm")._parameters)))
    with pytest.raises(tg.GraftError, match="recurrent layers keep a flat copy"):
        tg.plan(Recurrent(), method)


def test_a_zero_class_head_is_refused() -> None:
    with pytest.raises(tg.GraftError, match="num_classes=0"):
        tg.plan(_model("test_resnet"), "conv-adapter", 64, num_classes=0)


def test_a_plan_holds_no_data_of_its_own() -> None:
    """The forms of a plan are built on the meta device, copies of parameters included."""
    devices = []

    def make(anatomy: tg.Anatomy) -> list[Train]:
        placed = [Train("0", dict(anatomy.module("0")._parameters))]
        devices.extend(p.device.type for one in placed for p in one.parameters())
        return placed

    tg.plan(nn.Sequential(nn.Linear(4, 4)), Placed(make), example=((torch.randn(2, 4),), {}))
    assert set(devices) == {"meta"}


# -- as text --------------------------------------------------------------------------------------------


def test_a_plan_is_plain_data_and_prints_as_a_table() -> None:
    plan = tg.plan(_model("test_resnet"), "conv-adapter", 64, num_classes=5)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["parameters"] == sum(s["parameters"] for s in data["sites"]) == plan.parameters
    assert data["percent"] == pytest.approx(plan.percent)
    text = str(plan)
    assert f"{plan.parameters:,}" in text
    assert "stages[0].blocks[0].conv1" in text
    assert "GFLOP" in text
    assert "kept for the backward, batch of 1" in text
    assert data["saved_bytes"] == data["saved"]["exact"] == plan.saved_bytes


def test_a_model_that_accepts_no_guess_is_planned_without_costs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.conv(self.stem(x) * factor)

    model = TwoInputs().eval()
    plan = tg.plan(model, "bitfit")
    assert (plan.flops, plan.flops_added, plan.saved_bytes, plan.input) == (None, None, None, None)
    assert plan.parameters == 8
    assert "GFLOP" not in str(plan)
    example = ((torch.randn(1, 3, 8, 8), torch.ones(1)), {})
    assert tg.plan(model, "bitfit", example=example).flops == 2 * (36 * 4 * 27 + 16 * 4 * 36)
    assert run(model, *example[0]).shape == (1, 4, 4, 4)
