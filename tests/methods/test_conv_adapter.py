"""How Conv-Adapter's branches behave beside convolutions of every kind."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.layers import ConvGeometry
from torchgraft.methods.forms import ConvBottleneck

from .networks import images, tiny, train_step

SCHEMES = ("conv-parallel", "conv-sequential", "residual-parallel", "residual-sequential")


class Plain(nn.Module):
    """A stem, one convolution under test, pooling and a classifier."""

    def __init__(self, conv: nn.Module, *, dims: int = 2) -> None:
        super().__init__()
        stem = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.stem = stem(3, 8, 3, padding=1)
        self.conv = conv
        self.fc = nn.Linear(conv.out_channels, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.stem(x).relu()).flatten(2).mean(2))


def branch(adapter: tg.Adapter) -> ConvBottleneck:
    """The form of the adapter's first placement."""
    form = adapter.placements[0][1].form
    assert isinstance(form, ConvBottleneck)
    return form


CONVOLUTIONS = {
    "stride 2": nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "no padding": nn.Conv2d(8, 8, 3, stride=2),
    "patches": nn.Conv2d(8, 8, 2, stride=2),
    "two strides": nn.Conv2d(8, 8, (3, 5), stride=(2, 1), padding=(1, 2)),
    "dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(8, 12, 3, padding=1, groups=4),
    "depthwise": nn.Conv2d(8, 8, 7, padding=3, groups=8),
    "reflect": nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(8, 8, 4, padding="same"),
    "tensorflow same": Conv2dSame(8, 8, 5, stride=2),
    "transposed": nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
}


@pytest.mark.parametrize("size", [(17, 23), (16, 31)])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_branch_has_the_output_size_of_its_convolution_at_any_image_size(kind: str, size: tuple[int, int]) -> None:
    conv = CONVOLUTIONS[kind]
    adapter = tg.attach(Plain(conv), tg.ConvAdapter())
    u = torch.randn(2, 8, *size)
    with torch.no_grad():
        assert branch(adapter)(u).shape == conv(u).shape
    assert adapter.model(torch.randn(2, 3, *size)).shape == (2, 2)
    tg.detach(adapter.model)


@pytest.mark.parametrize("size", [15, 16, 17, 18])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (2, 2), (4, 3)])
def test_a_branch_beside_a_same_padded_convolution_samples_the_same_grid(size: int, kernel: int, stride: int) -> None:
    host = Conv2dSame(8, 8, kernel, stride=stride, groups=8)
    adapter = tg.attach(Plain(host), tg.ConvAdapter(reduction=1, act="identity"))
    form = branch(adapter)
    with torch.no_grad():
        form.conv1.weight.copy_(host.weight)
        form.conv1.bias.copy_(host.bias)
        form.conv2.weight.copy_(torch.eye(8)[:, :, None, None])
        u = torch.randn(2, 8, size, size)
        tg.activate(adapter.model, None)
        alone = host(u)
        tg.activate(adapter.model, "default")
        # 1 x 1 convolutions may sum in another order, so equal up to rounding.
        torch.testing.assert_close(host(u), 2 * alone)
        assert torch.equal(form.conv1(u), alone)


def test_a_branch_on_a_backbone_with_same_padding_pads_as_the_backbone_does() -> None:
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    adapter = tg.attach(model, tg.ConvAdapter(scheme="conv-parallel"))
    strided = [s for s in adapter.sites if model.get_submodule(s.path).stride == (2, 2)]
    assert strided
    for prefix, placement in adapter.placements:
        host = model.get_submodule(placement.home)
        assert isinstance(placement.form.conv1, Conv2dSame) == isinstance(host, Conv2dSame), prefix
    assert model(torch.randn(1, 3, 45, 51)).shape == (1, 1280)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("scheme", ["conv-parallel", "conv-sequential"])
def test_networks_over_signals_and_volumes_train(dims: int, scheme: str) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims](8, 8, 3, stride=2, padding=1)
    model = Plain(conv, dims=dims)
    x = torch.randn(2, 3, *(9, 11, 13)[:dims])
    plain = model(x)
    adapter = tg.attach(model, tg.ConvAdapter(scheme=scheme))
    assert torch.equal(model(x), plain)
    before = adapter.state_dict()["conv/parallel.conv2.weight" if "par" in scheme else "conv/sequential.conv2.weight"]
    before = before.clone()
    train_step(adapter, batch=x)
    assert not torch.equal(model(x), plain)
    assert branch(adapter).conv2.weight.shape == before.shape
    assert not torch.equal(branch(adapter).conv2.weight, before)


@pytest.mark.parametrize("init", ["zero", "official"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_reaches_all_parts_of_the_bottleneck_under_every_scheme(scheme: str, init: str) -> None:
    model = tiny("test_resnet")
    plain = model(images())
    adapter = tg.attach(model, tg.ConvAdapter(scheme=scheme, init=init))
    assert torch.equal(model(images()), plain) == (init == "zero")
    train_step(adapter, lr=1e-2)  # from the zero start only conv2 moves in the first step
    adapter.model.zero_grad()
    adapter.model(images()).square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("preset", [None, "official"])
def test_the_published_resnet_adds_after_the_activation_and_ours_before_the_norm(preset: str | None) -> None:
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3).eval()
    adapter = tg.attach(model, tg.ConvAdapter(reduction=2, init="official", preset=preset))
    block = model.layer1[0]
    form = branch(adapter)
    x = torch.randn(2, 64, 9, 9)
    with torch.no_grad():
        adapted = block(x)
        tg.activate(model, None)
        u = block.act1(block.bn1(block.conv1(x)))
        if preset == "official":
            v = block.act2(block.bn2(block.conv2(u))) + form(u)
        else:
            v = block.act2(block.bn2(block.conv2(u) + form(u)))
        expected = block.act3(block.bn3(block.conv3(v)) + block.downsample(x))
        torch.testing.assert_close(adapted, expected)


def test_every_output_of_the_first_convolution_reads_its_own_run_of_channels() -> None:
    form = ConvBottleneck(12, 5, 3, ConvGeometry.keeping_size(2, 3), init="default")
    u = torch.randn(1, 12, 4, 4)
    changed = u.clone()
    changed[:, 4:8] += 1
    moved = (form.conv1(u) - form.conv1(changed)).abs().amax(dim=(0, 2, 3))
    assert (moved > 0).tolist() == [False, True, False]


def test_a_reduction_that_does_not_divide_the_channels_is_rounded_to_one_that_does() -> None:
    adapter = tg.attach(Plain(nn.Conv2d(8, 8, 3, padding=1)), tg.ConvAdapter(reduction=3))
    assert branch(adapter).conv1.out_channels == 2
    adapter = tg.attach(Plain(nn.Conv2d(8, 8, 3, padding=1)), tg.ConvAdapter(reduction=100))
    assert branch(adapter).conv1.out_channels == 1


def test_a_convolution_named_exactly_is_adapted_even_where_the_method_would_not_choose_it() -> None:
    model = tiny("test_convnext")
    adapter = tg.attach(model, tg.ConvAdapter(), include="stem.0")
    assert [s.path for s in adapter.sites] == ["stem.0"]


MISTAKES = {
    "reduction of at least 1": ({"reduction": 0.5}, r"reduction=0\.5.*at least 1"),
    "positive kernel": ({"kernel": 0}, r"kernel=0.*at least 1"),
    "known activation": ({"act": "rellu"}, r"act='rellu'.*did you mean 'relu'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_option_says_what_was_given_and_what_is_expected(mistake: str) -> None:
    options, message = MISTAKES[mistake]
    with pytest.raises(tg.GraftError, match=message):
        tg.ConvAdapter(**options)


def test_a_wrong_word_in_the_string_form_names_the_valid_ones() -> None:
    with pytest.raises(tg.GraftError, match=r"scheme='parallel'.*'conv-parallel', 'conv-sequential'"):
        tg.method("conv-adapter[scheme=parallel]")


def test_a_model_that_reads_no_image_is_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    keys = list(model.state_dict())
    with pytest.raises(tg.GraftError, match=r"conv-adapter: Sequential reads no image.*token models"):
        tg.attach(model, tg.ConvAdapter())
    assert list(model.state_dict()) == keys


def test_a_network_of_point_wise_convolutions_has_no_site() -> None:
    with pytest.raises(tg.GraftError, match=r"conv-adapter: no site on Plain: no block and no convolution"):
        tg.attach(Plain(nn.Conv2d(8, 8, 1)), tg.ConvAdapter())
