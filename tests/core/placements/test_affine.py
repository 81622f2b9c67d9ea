"""Affine: scale and shift per channel, on the right axis and side, and folded into the layer's own weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm.layers as tl
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Affine, affine_for
from torchgraft.core.placements.base import Side

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
    "layernorm without weight": (lambda: nn.LayerNorm(4, elementwise_affine=False), TOKENS),
    "batchnorm without weight": (lambda: nn.BatchNorm2d(4, affine=False), MAP),
    "instancenorm": (lambda: nn.InstanceNorm2d(4, affine=True), MAP),
    "instancenorm without weight": (lambda: nn.InstanceNorm2d(4), MAP),
}
UNFOLDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "weight-standardised conv": (lambda: tl.StdConv2d(4, 4, 3), MAP),
    "norm with activation": (lambda: tl.BatchNormAct2d(4), MAP),
    "activation": (nn.ReLU, MAP),
}
# Either answer is good for these, as long as it is true.
DOUBTFUL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rmsnorm (no bias)": (lambda: nn.RMSNorm(4), TOKENS),
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


def _assert_folds(layer: nn.Module, x: Tensor, rows: slice | None = None) -> None:
    model, copied = nn.Sequential(layer), copy.deepcopy(layer)
    adapter = disturb(attach(model, lambda a: affine_for(a.module("0"), "0", rows=rows), x))
    wanted = run(model, x)
    folded = adapter.placements[0][1].folded(layer)
    for name, value in folded.items():
        assert name in copied._parameters, f"{type(copied).__name__} has no parameter {name!r} to fold into"
        copied._parameters[name] = nn.Parameter(value)
    assert_close(run(copied, x), wanted)


# -- a part of the channels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(2, 6), slice(None, 3), slice(-2, None), slice(0, 0)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_rows_confine_the_pair_to_some_channels(rows: slice, side: Side) -> None:
    model, x = nn.Sequential(_layer(lambda: nn.Linear(6, 6))).eval(), torch.randn(2, 5, 6)
    plain = copy.deepcopy(model)
    make = lambda a: affine_for(a.module("0"), "0", side=side, rows=rows)  # noqa: E731
    placed = disturb(attach(model, make, x)).placements[0][1]
    scale, shift = torch.ones(6), torch.zeros(6)
    scale[rows], shift[rows] = placed.scale.detach(), placed.shift.detach()
    assert placed.scale.shape == scale[rows].shape
    wanted = run(plain, x * scale + shift) if side == "input" else run(plain, x) * scale + shift
    assert_close(run(model, x), wanted)
    untouched = [i for i in range(6) if i not in range(*rows.indices(6))]
    if side == "output":
        assert torch.equal(run(model, x)[..., untouched], run(plain, x)[..., untouched])
    for name, value in placed.folded(model[0]).items():
        plain[0]._parameters[name] = nn.Parameter(value)
    assert_close(run(plain, x), wanted)


@pytest.mark.parametrize("kind", FOLDABLE)
def test_rows_fold_into_every_kind_of_layer(kind: str) -> None:
    make, shape = FOLDABLE[kind]
    _assert_folds(_layer(make), torch.randn(shape), rows=slice(1, 3))


def test_rows_with_a_step_are_refused() -> None:
    with pytest.raises(tg.GraftError, match=r"rows=slice\(0, 4, 2\) has a step; expected slice\(start, stop\)"):
        Affine("0", nn.Parameter(torch.ones(2)), None, axis=-1, rows=slice(0, 4, 2))


# -- the input ----------------------------------------------------------------------------------------------

READS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "linear": (lambda: nn.Linear(4, 6), TOKENS, True),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), TOKENS, True),
    "conv without padding": (lambda: nn.Conv2d(4, 6, 3, stride=2), MAP, True),
    "conv 1x1 without bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), MAP, True),
    "conv, zeros at the border": (lambda: nn.Conv2d(4, 6, 3, padding=1), MAP, False),
    "conv, padding='same'": (lambda: nn.Conv2d(4, 6, 3, padding="same"), MAP, False),
    "conv 1x1, padding='same'": (lambda: nn.Conv2d(4, 6, 1, padding="same"), MAP, True),
    "conv 1x1 on a padded map": (lambda: nn.Conv2d(4, 6, 1, padding=1), MAP, False),
    "conv, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), MAP, True),
    "conv, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), MAP, True),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), MAP, True),
    "depthwise conv": (lambda: nn.Conv2d(4, 8, 3, groups=4), MAP, True),
    "timm same": (lambda: tl.Conv2dSame(4, 6, 3, stride=2), MAP, False),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), TOKENS, True),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), MAP, False),
    "grouped transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), MAP, False),
}
"""Layer, shape of its input, and whether a shift of the input is the same for every position of the output."""


@pytest.mark.parametrize("kind", READS)
def test_the_input_is_scaled_and_shifted_and_what_folds_exactly_folds(kind: str) -> None:
    make, shape, constant = READS[kind]
    axis = -1 if "linear" in kind else 1
    for shift in (False, True):
        layer, x = _layer(make), torch.randn(shape)
        model, copied = nn.Sequential(layer), copy.deepcopy(layer)
        adapter = attach(model, lambda a, s=shift: affine_for(a.module("0"), "0", side="input", shift=s), x)
        assert torch.equal(run(model, x), run(copied, x)), "starts as the identity"
        placed = disturb(adapter).placements[0][1]
        shape_of = (-1,) if axis == -1 else (-1, *[1] * (x.dim() - 2))
        scale = placed.scale.detach().view(shape_of)
        added = placed.shift.detach().view(shape_of) if shift else torch.zeros(())
        wanted = run(copied, x * scale + added)
        assert_close(run(model, x), wanted)
        assert_every_tensor_learns(adapter, x)
        support = placed.supports_here(layer)
        assert support.merge == (constant or not shift)
        if not support.merge:
            assert "zeros are padded" in support.reason
            continue
        for name, value in placed.folded(layer).items():
            copied._parameters[name] = nn.Parameter(value)
        assert_close(run(copied, x), wanted)


def test_a_norm_does_not_take_a_scale_of_its_input() -> None:
    for norm in (nn.LayerNorm(4), nn.BatchNorm2d(4)):
        assert "normalises away" in affine_for(norm, "0", side="input").supports_here(norm).reason


# -- through the parameters ---------------------------------------------------------------------------------


def _through(layer: nn.Module, width: int, names: tuple[str | None, str | None] = ("weight", "bias")) -> Affine:
    return Affine("0", nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), axis=-1, through=names)


@pytest.mark.parametrize("bias", [True, False])
def test_acting_through_the_parameters_is_acting_on_the_output(bias: bool) -> None:
    model, x = nn.Sequential(_layer(lambda: nn.Linear(4, 6, bias=bias))).eval(), torch.randn(2, 4)
    plain, remembered = copy.deepcopy(model), Remembered(model, x)
    adapter = disturb(attach(model, lambda a: _through(a.module("0"), 6), x))
    placed = adapter.placements[0][1]
    with torch.no_grad():
        assert_close(run(model, x), run(plain, x) * placed.scale + placed.shift)
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


def test_it_stands_between_a_norm_and_the_activation_inside() -> None:
    model, x = nn.Sequential(_layer(lambda: tl.BatchNormAct2d(4))).eval(), torch.randn(MAP)
    norm = copy.deepcopy(model[0])
    norm.act = nn.Identity()
    adapter = disturb(attach(model, lambda a: affine_for(a.module("0"), "0", before_act=True), x))
    scale, shift = (t.view(4, 1, 1) for t in adapter.state_dict().values())
    assert_close(run(model, x), torch.relu(run(norm, x) * scale + shift))
    assert adapter.placements[0][1].supports_here(model[0]).merge


def test_it_reaches_a_projection_that_is_never_called() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x = Host().eval(), torch.randn(2, 5, 4)
    remembered, reference = Remembered(model, x), copy.deepcopy(model)
    names, rows = ("in_proj_weight", "in_proj_bias"), slice(4, 12)
    make = lambda _: Affine(  # noqa: E731
        "attention", nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8)), axis=-1, rows=rows, through=names
    )
    adapter = disturb(attach(model, make, x))
    scale, shift = adapter.state_dict().values()
    with torch.no_grad():
        reference.attention.in_proj_weight[rows] *= scale[:, None]
        reference.attention.in_proj_bias[rows] = reference.attention.in_proj_bias[rows] * scale + shift
    assert_close(run(model, x), run(reference, x))
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


def test_an_input_cannot_be_shifted_through_the_parameters() -> None:
    one = nn.Parameter(torch.ones(4))
    with pytest.raises(tg.GraftError, match=r"affine at '0': .*drop through="):
        Affine("0", one, one, axis=-1, side="input", through=("weight", "bias"))


def test_a_parameter_that_is_not_there_is_refused_at_attach() -> None:
    model, x = nn.Sequential(nn.RMSNorm(4)), torch.randn(2, 4)
    with pytest.raises(tg.GraftError, match="RMSNorm holds no parameter 'bias'"):
        attach(model, lambda a: _through(a.module("0"), 4), x)


@pytest.mark.parametrize("side", ["input", "output"])
def test_autocast_leaves_the_type_of_the_stream_and_the_precision_of_the_values(side: Side) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    adapter = attach(model, lambda a: affine_for(a.module("1"), "1", side=side), x)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.fill_(1.001 if name.endswith("scale") else 0.0)
    seen: list[Tensor] = []
    adapter.placements[0][1].scale.register_hook(seen.append)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert seen[0].dtype == torch.float32
