"""The floor of nets whose answer can be written down."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torchgraft as tg
from torchgraft.bench.floor import GATES, HEAD, HIDDEN, INPUTS, MASKS, NORMS, POOLING, SMOOTH, Floor, floor
from torchgraft.bench.subjects import Setting, subject

N, C, SIDE = 2, 8, 4
MAP = N * C * SIDE * SIDE
"""Elements of one activation."""


class Shift(nn.Module):
    """Adds a trainable number, so that whatever follows has an input that wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Factor(nn.Module):
    """A trainable factor per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Twice(nn.Module):
    """Two branches that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = trained(conv()), trained(conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def conv(kernel: int = 1) -> nn.Module:
    return nn.Conv2d(C, C, kernel, padding=kernel // 2).requires_grad_(False)


def trained(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(True)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def of(*layers: nn.Module, shift: bool = True) -> Floor:
    model = nn.Sequential(*([Shift()] if shift else []), *layers).eval()
    return floor(model, ((torch.randn(N, C, SIDE, SIDE),), {}))


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ([conv(3)], {}),
        ([frozen(nn.BatchNorm2d(C))], {}),
        ([nn.AvgPool2d(2)], {}),
        ([conv(), conv(3), frozen(nn.BatchNorm2d(C))], {}),
        ([conv(), nn.ReLU()], {MASKS: MAP // 8}),
        ([conv(), nn.ReLU(inplace=True)], {MASKS: MAP // 8}),
        ([conv(), nn.ReLU6()], {MASKS: MAP // 8}),
        ([conv(), nn.ReLU(), nn.ReLU()], {MASKS: 2 * MAP // 8}),
        ([conv(), nn.SiLU()], {SMOOTH: 4 * MAP}),
        ([conv(), nn.SiLU(inplace=True)], {SMOOTH: 4 * MAP}),
        ([conv(), nn.MaxPool2d(2)], {POOLING: MAP // 4 // 2}),
        # Whatever follows from a kept tensor is not kept again.
        ([conv(), nn.SiLU(), nn.SiLU()], {SMOOTH: 4 * MAP}),
        ([conv(), nn.SiLU(), Gate()], {SMOOTH: 4 * (MAP + N * C)}),
        ([conv(), Gate()], {GATES: 4 * MAP, SMOOTH: 4 * N * C}),
        ([conv(), nn.ReLU(), trained(conv())], {INPUTS: 4 * MAP}),
        ([conv(), nn.ReLU6(), trained(conv())], {INPUTS: 4 * MAP}),
        ([conv(), nn.GELU(), trained(conv())], {SMOOTH: 4 * MAP}),
        ([conv(), Twice()], {INPUTS: 4 * MAP}),
        ([conv(), nn.ReLU(), Twice(), nn.ReLU()], {INPUTS: 4 * MAP, MASKS: MAP // 8}),
        # A trainable factor: once per matrix product, nothing where the product's weight is trained too.
        ([conv(), Factor()], {INPUTS: 4 * MAP}),
        ([trained(conv()), Factor()], {INPUTS: 4 * MAP}),
        ([conv(), Factor(), frozen(nn.BatchNorm2d(C)), Factor()], {INPUTS: 4 * MAP}),
        ([conv(), trained(nn.BatchNorm2d(C)), nn.SiLU()], {SMOOTH: 4 * MAP}),
        ([conv(), nn.GELU(), conv(), Factor()], {SMOOTH: 4 * MAP}),
    ],
    ids=lambda value: "-".join(type(m).__name__ for m in value) if isinstance(value, list) else "",
)
def test_a_chain_of_layers_has_the_floor_that_the_rules_give(layers: list, wanted: dict) -> None:
    found = of(*layers).parts()
    # Which of two equal readers a tensor is entered for is no matter.
    assert sum(found.values()) == sum(wanted.values()), found
    assert set(found) == set(wanted)


def test_a_layer_norm_keeps_its_input_and_two_statistics_per_position() -> None:
    model = nn.Sequential(Shift(), frozen(nn.LayerNorm(C)), frozen(nn.Linear(C, C)), trained(nn.Linear(C, 1)))
    found = floor(model, ((torch.randn(N, 5, C),), {})).parts()
    assert found == {NORMS: 4 * N * 5 * (C + 2), INPUTS: 4 * N * 5 * C}


def test_nothing_below_the_first_trainable_module_counts() -> None:
    assert of(conv(), nn.SiLU(), nn.ReLU(), trained(conv()), shift=False).parts() == {INPUTS: 4 * MAP}
    assert of(conv(), nn.SiLU(), shift=False).bytes == 0


def test_the_image_itself_is_in_memory_anyway() -> None:
    assert of(trained(conv()), shift=False).bytes == 0
    assert of(conv(), Factor(), shift=False).bytes == 0


def test_half_precision_halves_the_floor_of_what_is_no_mask() -> None:
    x = torch.randn(N, C, SIDE, SIDE)
    model = nn.Sequential(Shift(), conv(), nn.SiLU(), conv(), nn.ReLU())
    full = floor(model, ((x,), {})).parts()
    half = floor(model.bfloat16(), ((x.bfloat16(),), {})).parts()
    assert half == {SMOOTH: full[SMOOTH] // 2, MASKS: full[MASKS]}


def test_dropout_that_acts_needs_one_bit_an_element() -> None:
    model = nn.Sequential(Shift(), nn.Dropout(0.5))
    assert floor(model, ((torch.randn(N, C),), {})).parts() == {MASKS: N * C // 8}


@pytest.mark.parametrize("method", ["conv-adapter", "lora", "ssf"])
def test_an_adapted_network_has_the_same_floor_without_data(method: str) -> None:
    one = subject(Setting("test_resnet", 2, 64), method)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ghost = one.ghost(mode)
    with mode:
        fake = floor(ghost.model, ((ghost.image,), {}))
    assert fake.parts() == floor(one.model, ((one.image,), {})).parts()
    assert fake.bytes > 0


def test_inputs_hidden_layers_and_head_of_an_adapter_are_told_apart() -> None:
    model = timm.create_model("test_resnet").eval()
    tg.attach(model, "conv-adapter[reduction=4]", num_classes=5, lean=False, fold=False)
    shapes = {}
    for path, module in model.named_modules():
        if path.endswith((".form.conv1", ".form.act")) or path == "fc":
            module.register_forward_pre_hook(lambda m, args, path=path: shapes.update({path: args[0].numel()}))
    found = floor(model, ((torch.randn(2, 3, 64, 64),), {})).parts()
    assert found[INPUTS] == 4 * sum(n for path, n in shapes.items() if path.endswith("conv1"))
    assert found[HIDDEN] == 4 * sum(n for path, n in shapes.items() if path.endswith("act"))
    assert found[HEAD] == 4 * shapes["fc"]


@pytest.mark.parametrize(
    ("model", "wanted"),
    [("resnet50", {INPUTS: 58.2, HIDDEN: 10.5}), ("convnext_tiny", {SMOOTH: 261.8, INPUTS: 65.5})],
)
def test_adapters_in_all_blocks_have_the_floor_that_was_counted_by_hand(model: str, wanted: dict) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ghost = subject(Setting(model, 1, 224), "conv-adapter[reduction=4]").ghost(mode)
    with mode:
        parts = floor(ghost.model, ((ghost.image,), {})).parts()
    for part, mib in wanted.items():  # of a batch of 8
        assert 8 * parts[part] / 2**20 == pytest.approx(mib, abs=0.05)
