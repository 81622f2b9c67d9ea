"""Affine: scale and shift per channel, on the right axis, and folded into the layer's own weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm.layers as tl
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Affine, affine_for

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, disturb, run

MAP, SQUARE, TOKENS = (2, 4, 5, 6), (2, 4, 4, 4), (2, 4, 4)

# Layer, shape of its input, axis of the channels in its output. Square shapes: a wrong axis must not be found
# out by a mere error of shapes.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear on vectors": (lambda: nn.Linear(4, 4), (3, 4), -1),
    "linear on tokens": (lambda: nn.Linear(4, 4), TOKENS, -1),
    "linear on a channels-last map": (lambda: nn.Linear(4, 4), SQUARE, -1),
    "conv1d": (lambda: nn.Conv1d(4, 4, 1), TOKENS, 1),
    "conv2d": (lambda: nn.Conv2d(4, 4, 1), SQUARE, 1),
    "conv3d": (lambda: nn.Conv3d(4, 4, 1), (2, 4, 4, 4, 4), 1),
    "batchnorm2d": (lambda: nn.BatchNorm2d(4), SQUARE, 1),
    "batchnorm1d": (lambda: nn.BatchNorm1d(4), (3, 4), 1),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), SQUARE, 1),
    "instancenorm": (lambda: nn.InstanceNorm2d(4), SQUARE, 1),
    "layernorm": (lambda: nn.LayerNorm(4), TOKENS, -1),
    "rmsnorm": (lambda: nn.RMSNorm(4), TOKENS, -1),
    "timm layernorm2d": (lambda: tl.LayerNorm2d(4), SQUARE, 1),
    "timm rmsnorm2d": (lambda: tl.RmsNorm2d(4), SQUARE, 1),
    "timm batchnorm with activation": (lambda: tl.BatchNormAct2d(4), SQUARE, 1),
    "timm groupnorm of one group": (lambda: tl.GroupNorm1(4), SQUARE, 1),
}
FOLDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), TOKENS),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), TOKENS),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), MAP),
    "conv without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), MAP),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), MAP),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), MAP),
    "grouped transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), MAP),
    "batchnorm": (lambda: nn.BatchNorm2d(4), MAP),
    "layernorm": (lambda: nn.LayerNorm(4), TOKENS),
    "layernorm without bias": (lambda: nn.LayerNorm(4, bias=False), TOKENS),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), MAP),
    "timm layernorm2d": (lambda: tl.LayerNorm2d(4), MAP),
}
UNFOLDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "weight-standardised conv": (lambda: tl.StdConv2d(4, 4, 3), MAP),
    "norm with activation": (lambda: tl.BatchNormAct2d(4), MAP),
    "activation": (nn.ReLU, MAP),
}
# Either answer is good for these, as long as it is true.
DOUBTFUL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rmsnorm (no bias)": (lambda: nn.RMSNorm(4), TOKENS),
    "layernorm without weight": (lambda: nn.LayerNorm(4, elementwise_affine=False), TOKENS),
    "batchnorm without weight": (lambda: nn.BatchNorm2d(4, affine=False), MAP),
    "instancenorm": (lambda: nn.InstanceNorm2d(4, affine=True), MAP),
    "norm whose activation is the identity": (lambda: tl.BatchNormAct2d(4, apply_act=False), MAP),
    "timm rmsnorm2d": (lambda: tl.RmsNorm2d(4), MAP),
}


def _layer(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer whose parameters and statistics are no longer those of a fresh one."""
    torch.manual_seed(0)
    layer = make().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in layer.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_every_channel_is_scaled_and_shifted_by_its_own_values(kind: str) -> None:
    make, shape, axis = KINDS[kind]
    model, x = nn.Sequential(_layer(make)).eval(), torch.randn(shape)
    remembered = Remembered(model, x)
    plain = run(model, x)
    adapter = disturb(attach(model, lambda a: affine_for(a.module("0"), "0"), x))
    scale, shift = (adapter.state_dict()[f"0/affine.{n}"] for n in ("scale", "shift"))
    found = run(model, x)
    for c in range(4):
        assert_close(found.select(axis, c), plain.select(axis, c) * scale[c] + shift[c])
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


def test_a_module_of_several_layers_is_scaled_on_the_right_axis_or_refused() -> None:
    model, x = nn.Sequential(_layer(lambda: tl.ConvNormAct(4, 4))).eval(), torch.randn(SQUARE)
    plain = run(model, x)
    try:
        adapter = disturb(attach(model, lambda a: affine_for(a.module("0"), "0"), x))
    except tg.GraftError:
        return
    scale, shift = (t.view(4, 1, 1) for t in adapter.state_dict().values())
    assert_close(run(model, x), plain * scale + shift)


@pytest.mark.parametrize(("scale", "shift"), [(True, False), (False, True)])
def test_scale_and_shift_can_stand_alone(scale: bool, shift: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    plain = run(model, x)
    adapter = attach(model, lambda a: affine_for(a.module("0"), "0", scale=scale, shift=shift), x)
    assert torch.equal(run(model, x), plain), "starts as the identity"
    disturb(adapter)
    (value,) = adapter.parameters()
    assert_close(run(model, x), (plain * value if scale else plain + value).detach())


def test_a_module_without_a_fixed_width_is_refused_by_name() -> None:
    for module in (nn.ReLU(), nn.LayerNorm([4, 4])):
        with pytest.raises(tg.GraftError, match=r"'?act\.0'?.*channels"):
            affine_for(module, "act.0")


@pytest.mark.parametrize("kind", FOLDABLE)
def test_the_folded_layer_gives_the_adapted_output(kind: str) -> None:
    make, shape = FOLDABLE[kind]
    assert Affine.supports(_layer(make)).merge
    _assert_folds(_layer(make), torch.randn(shape))


@pytest.mark.parametrize("kind", UNFOLDABLE)
def test_what_cannot_fold_says_why(kind: str) -> None:
    support = Affine.supports(_layer(UNFOLDABLE[kind][0]))
    assert support.forward
    assert not support.merge
    assert support.reason


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_a_layer_that_is_said_to_fold_does(kind: str) -> None:
    make, shape = DOUBTFUL[kind]
    layer = _layer(make)
    if not Affine.supports(layer).merge:
        assert Affine.supports(layer).reason
    else:
        _assert_folds(layer, torch.randn(shape))


def _assert_folds(layer: nn.Module, x: Tensor) -> None:
    model, copied = nn.Sequential(layer), copy.deepcopy(layer)
    adapter = disturb(attach(model, lambda a: affine_for(a.module("0"), "0"), x))
    wanted = run(model, x)
    folded = adapter.placements[0][1].folded(layer)
    for name, value in folded.items():
        assert name in copied._parameters, f"{type(copied).__name__} has no parameter {name!r} to fold into"
        copied._parameters[name] = nn.Parameter(value)
    assert_close(run(copied, x), wanted)
