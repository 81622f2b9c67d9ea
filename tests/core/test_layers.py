"""Layer kinds: what a layer is, where its channels are, and branches that slide like a convolution."""

from __future__ import annotations

import copy

import pytest
import timm.layers as tl
import torch
from torch import nn

from torchgraft.core.layers import (
    ACTIVATIONS,
    ConvGeometry,
    activation_like,
    channel_axis,
    in_channels,
    is_batchnorm,
    is_conv,
    is_norm,
    is_standardised,
    kind_of,
    make_activation,
    out_channels,
)
from torchgraft.methods.forms import ConvBottleneck
from torchgraft.swap import swap

from .attaching import assert_close, run
from .layer_kinds import CONVS, build, inputs


class Layer:
    """Any swapped-in layer."""


# -- geometry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONVS)
def test_a_convolution_of_the_same_geometry_with_the_same_weight_gives_the_same_output(kind: str) -> None:
    conv = build(kind)
    twin = ConvGeometry.of(conv).build(conv.in_channels, conv.out_channels, groups=conv.groups)
    weight = conv.weight
    if is_standardised(conv):  # a plain convolution, given the weight that the layer makes of its own
        weight = _standardised(conv)
    with torch.no_grad():
        twin.weight.copy_(weight)
        twin.bias.copy_(conv.bias if conv.bias is not None else torch.zeros(conv.out_channels))
    for x in inputs(kind):
        assert_close(run(twin, x), run(conv, x))


@pytest.mark.parametrize("kind", CONVS)
def test_applying_a_weight_gives_what_the_layer_would_without_its_bias(kind: str) -> None:
    conv = build(kind)
    plain = copy.deepcopy(conv)
    if plain.bias is not None:
        plain.bias.data.zero_()
    weight = _standardised(conv) if is_standardised(conv) else conv.weight
    for x in inputs(kind):
        with torch.no_grad():
            assert_close(ConvGeometry.of(conv).apply(x, weight, conv.groups), run(plain, x))


@pytest.mark.parametrize("kind", CONVS)
def test_a_bottleneck_beside_any_convolution_has_its_output_shape(kind: str) -> None:
    conv = build(kind)
    bottleneck = ConvBottleneck(conv.in_channels, conv.out_channels, 2, ConvGeometry.of(conv))
    for x in inputs(kind):
        assert run(bottleneck, x).shape == run(conv, x).shape


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("kind", CONVS)
def test_another_kernel_keeps_the_output_shape_or_is_an_error(kind: str, kernel: int) -> None:
    conv = build(kind)
    try:
        geometry = ConvGeometry.of(conv).with_kernel(kernel)
    except ValueError as error:
        assert str(kernel) in str(error)
        return
    other = geometry.build(conv.in_channels, conv.out_channels)
    assert set(other.kernel_size) == {kernel}
    for x in inputs(kind):
        assert run(other, x).shape == run(conv, x).shape


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7, (3, 5)])
def test_a_kernel_that_keeps_the_size_does(kernel: int | tuple[int, int]) -> None:
    conv = ConvGeometry.keeping_size(2, kernel).build(3, 5)
    for size in ((9, 7), (8, 10)):
        assert run(conv, torch.randn(1, 3, *size)).shape == (1, 5, *size)


def test_an_odd_kernel_with_a_stride_halves_the_size_and_an_even_one_is_refused() -> None:
    conv = ConvGeometry.keeping_size(2, 3, 2).build(3, 5)
    assert run(conv, torch.randn(1, 3, 8, 9)).shape == (1, 5, 4, 5)
    with pytest.raises(ValueError, match="even kernel"):
        ConvGeometry.keeping_size(2, 4, 2)


def test_the_geometry_of_a_branch_is_never_standardised_and_keeps_groups_and_bias() -> None:
    geometry = ConvGeometry.of(tl.StdConv2dSame(4, 6, 3, stride=2, padding="SAME"))
    conv = geometry.build(4, 6, groups=2, bias=False)
    assert type(conv) is tl.Conv2dSame
    assert (conv.groups, conv.bias) == (2, None)


def _standardised(conv: nn.Module) -> torch.Tensor:
    """(w - mean) / sqrt(var + eps) per output channel; the scaled kind also has a gain and 1 / sqrt(fan in)."""
    flat = conv.weight.flatten(1)
    weight = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, unbiased=False) + conv.eps).sqrt()
    if hasattr(conv, "gain"):
        weight = weight * conv.gain.flatten(1) * conv.scale
    return weight.view_as(conv.weight)


# -- kinds ----------------------------------------------------------------------------------------------

KINDS: dict[str, nn.Module] = {
    "linear": nn.Linear(4, 6),
    "conv2d": nn.Conv2d(4, 6, 3),
    "conv1d": nn.Conv1d(4, 6, 3),
    "conv3d": nn.Conv3d(4, 6, 3),
    "grouped-conv2d": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise-conv2d": nn.Conv2d(4, 4, 3, groups=4),
    "dilated-conv2d": nn.Conv2d(4, 6, 3, dilation=2),
    "reflect-conv2d": nn.Conv2d(4, 6, 3, padding_mode="reflect"),
    "same-conv2d": tl.Conv2dSame(4, 6, 3),
    "std-conv2d": tl.ScaledStdConv2d(4, 6, 3),
    "std-same-grouped-conv2d": tl.StdConv2dSame(4, 6, 3, stride=2, groups=2, padding="SAME"),
    "conv_transpose2d": nn.ConvTranspose2d(4, 6, 2),
    "batchnorm": tl.BatchNormAct2d(4),
    "groupnorm": tl.GroupNorm1(4),
    "layernorm": tl.LayerNorm2d(4),
    "attention": nn.MultiheadAttention(4, 2),
    "embedding": nn.Embedding(4, 6),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_the_same_with_and_without_adapters(kind: str, swapped: bool) -> None:
    module = copy.deepcopy(KINDS[kind])
    if swapped:
        swap(module, Layer)
    assert kind_of(module) == kind
    assert is_conv(module) == ("conv" in kind)
    assert is_norm(module) == ("norm" in kind)
    assert is_batchnorm(module) == (kind == "batchnorm")
    assert is_standardised(module) == kind.startswith("std")


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        tl.LayerNorm2d(4),
        tl.RmsNorm(4),
        tl.RmsNorm2d(4),
        tl.GroupNormAct(4, 2),
        tl.LayerNormAct2d(4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_norms_of_every_library_are_norms(norm: nn.Module) -> None:
    assert is_norm(norm)
    assert in_channels(norm) == out_channels(norm) == 4


def test_a_module_that_holds_norms_is_none() -> None:
    class LayerNormBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

    assert not is_norm(LayerNormBlock())
    assert not is_norm(nn.Sequential(nn.LayerNorm(4)))


# In every shape all axes but the batch have the same size, so that only the values tell them apart.
AXES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 4), (2, 4, 4)),
    "conv1d": (nn.Conv1d(4, 4, 1), (2, 4, 4)),
    "conv2d": (nn.Conv2d(4, 4, 1), (2, 4, 4, 4)),
    "transposed conv2d": (nn.ConvTranspose2d(4, 4, 1), (2, 4, 4, 4)),
    "batchnorm": (nn.BatchNorm2d(4), (2, 4, 4, 4)),
    "groupnorm": (nn.GroupNorm(2, 4), (2, 4, 4, 4)),
    "instancenorm": (nn.InstanceNorm2d(4, affine=True), (2, 4, 4, 4)),
    "layernorm": (nn.LayerNorm(4), (2, 4, 4)),
    "rmsnorm": (nn.RMSNorm(4), (2, 4, 4)),
    "timm layernorm2d": (tl.LayerNorm2d(4), (2, 4, 4, 4)),
    "timm rmsnorm": (tl.RmsNorm(4), (2, 4, 4)),
    "timm rmsnorm2d": (tl.RmsNorm2d(4), (2, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", AXES)
def test_the_channel_axis_is_the_one_along_which_the_weight_acts(kind: str) -> None:
    """Doubling the c-th weight of the layer changes exactly the c-th slice along its channel axis."""
    module, shape = AXES[kind]
    module, x = copy.deepcopy(module).eval(), torch.randn(shape)
    with torch.no_grad():
        module.weight.add_(0.1 * torch.rand_like(module.weight))
    plain = run(module, x)
    with torch.no_grad():
        (module.weight[:, 2] if kind.startswith("transposed") else module.weight[2]).mul_(2)
    changed = (run(module, x) - plain).abs()
    axis = channel_axis(module)
    others = [d for d in range(changed.dim()) if d != axis % changed.dim()]
    assert (changed.amax(others) > 1e-4).tolist() == [False, False, True, False]


# -- activations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_made_fresh_and_acts_elementwise(name: str) -> None:
    act, x = make_activation(name), torch.randn(2, 3)
    assert act is not make_activation(name)
    assert act(x).shape == x.shape
    assert not getattr(act, "inplace", False)


def test_a_branch_follows_the_first_activation_of_its_host() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.GELU())
    assert activation_like(host) == "silu"
    swap(host[1], Layer)
    assert activation_like(host) == "silu"
    assert activation_like(nn.Linear(4, 4), default="gelu") == "gelu"
    assert activation_like(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6())) == "relu6"


def test_the_activation_found_is_the_one_computed() -> None:
    x = torch.randn(50)
    for module in (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(), nn.ELU(), nn.Mish()):
        assert_close(make_activation(activation_like(nn.Sequential(module)))(x), module(x))
    quick = make_activation("quick_gelu")
    assert_close(quick(x), x * torch.sigmoid(1.702 * x))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_strided_kernel_of_one_pixel_convolves_as_the_layer_does(padding: int, groups: int) -> None:
    conv = nn.Conv2d(4, 8, 1, stride=2, padding=padding, groups=groups, bias=False)
    x = torch.randn(2, 4, 9, 7).to(memory_format=torch.channels_last)
    ours = ConvGeometry.of(conv).apply(x, conv.weight, groups)
    torch.testing.assert_close(ours, conv(x))
    ours.square().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.isfinite().all()
