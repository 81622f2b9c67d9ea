"""Every lean layer: the native gradients, bit for bit, wherever autograd can be found, and no more kept than needed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from torchgraft.lean import layers, saved
from torchgraft.lean.install import make_lean, make_plain
from torchgraft.lean.kinds import lean_layer
from torchgraft.lean.meter import saved_bytes

from ..core.layer_kinds import CONVS, NORMS, Make

ELEMENTWISE: dict[str, Make] = {
    "relu": lambda: nn.ReLU(),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(),
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.7),
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "leaky relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "hardsigmoid": lambda: nn.Hardsigmoid(),
    "gelu": lambda: nn.GELU(),
    "silu": lambda: nn.SiLU(),
    "silu in place": lambda: nn.SiLU(inplace=True),
    "hardswish": lambda: nn.Hardswish(),
}
POOLS: dict[str, Make] = {
    "maxpool": lambda: nn.MaxPool2d(3, 2, 1),
    "avgpool": lambda: nn.AvgPool2d(2),
    "adaptive avgpool": lambda: nn.AdaptiveAvgPool2d(2),
}
LAYERS = CONVS | NORMS | ELEMENTWISE | POOLS

NOTHING = {n for n in (*CONVS, "batchnorm2d", "avgpool", "adaptive avgpool") if "standardised" not in n}
BITS = {n for n in ELEMENTWISE if not any(word in n for word in ("gelu", "silu", "hardswish"))}


class Around(nn.Module):
    """A layer behind an operator, as in a network: its input is no leaf, and may be changed in place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 1.5)


def _model(name: str) -> Around:
    torch.manual_seed(0)
    model = Around(LAYERS[name]())
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
    return model


def _input(name: str, layer: nn.Module) -> Tensor:
    dims = {"1": 1, "3": 3}.get(type(layer).__name__[-2:-1], 2) if name in CONVS else 2
    shape = {1: (2, 4, 11), 2: (2, 4, 8, 10), 3: (2, 4, 3, 6, 5)}[dims]
    shape = (2, 5, 4) if name == "layernorm" else shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _gradient(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
    out = (run or (lambda m, x: m(x)))(model, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    x.grad = None
    (out.float() * weights).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def _lean(model: nn.Module) -> nn.Module:
    make_lean(model, list(model.modules()), [])
    return model


def _autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def _offloaded(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return model(x)


CONTEXTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "eager": lambda m, x: m(x),
    "autocast": _autocast,
    "checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "reentrant checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "save_on_cpu": _offloaded,
    "called twice": lambda m, x: m(x) * m(x * 0.5),
}


@pytest.fixture(autouse=True)
def _dropped_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "DROPPED_AS_NAN", True)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_native_ones_bit_for_bit(name: str, context: str) -> None:
    model = _model(name)
    x = _input(name, model.layer)
    wanted = _gradient(model, x, CONTEXTS[context])
    found = _gradient(_lean(model), x, CONTEXTS[context])
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "layernorm" and "1d" not in n and "3d" not in n])
def test_channels_last_maps_stay_so_and_give_the_native_gradients(name: str) -> None:
    model = _model(name).to(memory_format=torch.channels_last)
    x = _input(name, model.layer).detach().to(memory_format=torch.channels_last).requires_grad_()
    wanted = _gradient(model, x)
    found = _gradient(_lean(model), x)
    assert torch.equal(found[1], wanted[1]) and found[1].stride() == wanted[1].stride()
    assert found[0].stride() == wanted[0].stride()


@pytest.mark.parametrize("name", LAYERS)
def test_no_more_is_kept_than_the_backward_needs(name: str) -> None:
    model = _model(name)
    x = _input(name, model.layer)
    own = (*model.parameters(), *model.buffers(), x)
    plain = saved_bytes(lambda: model(x), own)
    elements = x.numel() if name in ELEMENTWISE else model(x).numel()
    kept = saved_bytes(lambda: _lean(model)(x), own)
    if name in NOTHING:
        assert kept == 0 < plain
    elif name in BITS:
        assert kept == math.ceil(elements / 8)
    elif name == "maxpool":
        assert kept == math.ceil(elements / 2)
    else:
        assert 0 < kept <= plain


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in (*POOLS, "hardsigmoid")])
def test_a_second_derivative_is_the_native_one(name: str) -> None:
    model = _model(name)
    x = _input(name, model.layer)

    def second() -> Tensor:
        out = model(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(grad.square().sum(), x)
        return again

    wanted = second()
    _lean(model)
    assert torch.equal(second(), wanted)


@pytest.mark.parametrize("name", [n for n in LAYERS if "in place" not in n])
def test_function_transforms_and_forward_mode_give_the_native_values(name: str) -> None:
    model = _model(name)
    x = _input(name, model.layer).detach()
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))

    def values() -> list[Tensor]:
        gradient = torch.func.grad(lambda z: model(z).square().sum())(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), tangent)
            out = torch.autograd.forward_ad.unpack_dual(model(dual))
        return [gradient, out.primal, out.tangent]

    wanted = values()
    _lean(model)
    for a, b in zip(values(), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["conv2d", "linear", "batchnorm2d", "timm same"])
def test_a_layer_whose_weight_is_trained_after_all_keeps_what_it_needs(name: str) -> None:
    layer = nn.Linear(10, 3) if name == "linear" else LAYERS[name]()
    model = Around(layer)
    x = _input(name, layer)
    _lean(model)
    model.requires_grad_(True)
    model(x).square().sum().backward()
    found = layer.weight.grad.clone()  # type: ignore[union-attr, operator]
    make_plain(model)
    model.zero_grad()
    model(x).square().sum().backward()
    assert torch.equal(found, layer.weight.grad)  # type: ignore[arg-type]


def test_dropout_keeps_a_bit_and_the_native_gradient() -> None:
    model = Around(nn.Dropout(0.3))
    model.train()
    x = torch.randn(4, 6, 8, requires_grad=True)
    torch.manual_seed(5)
    wanted = _gradient(model, x)
    _lean(model)
    torch.manual_seed(5)
    found = _gradient(model, x)
    assert torch.equal(found[1], wanted[1]) and (found[1] == 0).any()
    assert saved_bytes(lambda: model(x), [x]) == x.numel() // 8


def test_an_activation_inside_a_norm_is_not_taken_for_the_norm() -> None:
    import timm.layers as tl

    model = Around(tl.BatchNormAct2d(4, act_layer=nn.Softplus))
    assert lean_layer(model.layer.act) is None
    x = _input("batchnorm2d", model.layer)
    wanted = _gradient(model, x)
    found = _gradient(_lean(model), x)
    assert torch.equal(found[1], wanted[1])


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    assert lean_layer(Own(3, 3, 1)) is None
    assert lean_layer(nn.Conv2d(3, 3, 1)) is not None


def test_under_autocast_no_copy_of_a_frozen_weight_is_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
    x = torch.randn(2, 64, requires_grad=True)
    wanted = _gradient(model, x, _autocast)
    plain = saved_bytes(lambda: _autocast(model, x), [*model.parameters(), x])
    _lean(model)
    assert torch.equal(_gradient(model, x, _autocast)[1], wanted[1])
    kept = saved_bytes(lambda: _autocast(model, x), [*model.parameters(), x])
    assert kept <= plain - 2 * 64 * 64 * 2


def test_the_model_is_plain_again_when_lean_layers_are_taken_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MultiheadAttention(4, 2)).eval()
    classes = [type(m) for m in model.modules()]
    held = [dict(m.__dict__) for m in model.modules()]
    _lean(model)
    assert [type(m) for m in model.modules()] != classes
    make_plain(model)
    assert [type(m) for m in model.modules()] == classes
    assert [m.__dict__.keys() for m in model.modules()] == [h.keys() for h in held]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_fused_relu_of_gpus_gives_the_native_derivatives_and_keeps_bits(
    monkeypatch: pytest.MonkeyPatch, inplace: bool, layout: torch.memory_format
) -> None:
    model = Around(nn.ReLU(inplace=inplace))
    x = torch.randn(2, 3, 5, 7).to(memory_format=layout).requires_grad_()

    def derivatives() -> list[Tensor]:
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return [model(x).detach(), first.detach(), second, _gradient(model, x)[1]]

    wanted = derivatives()
    _lean(model)
    monkeypatch.setattr(layers, "fuses", lambda x: True)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(derivatives(), wanted, strict=True))
    assert saved_bytes(lambda: model(x), [x]) == math.ceil(x.numel() / 8)
