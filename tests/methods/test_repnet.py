"""RepNet: the wiring of the side network, on the published backbone and on others."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Placement
from torchgraft.methods.forms.program_module import ProgramModule, StandardisedConv2d

from .networks import anatomy, images, tiny


def resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(Bottleneck, (1, 1, 1, 3), channels=(8, 8, 8, 8), num_classes=3).eval()


def opened(adapter: tg.Adapter) -> list[ProgramModule]:
    """The sides in their order, with a last norm that lets something through."""
    forms = [placement.form for _, placement in adapter.placements if isinstance(placement.form, ProgramModule)]
    for form in forms:
        nn.init.normal_(form.final_bn.weight)
    return forms


@pytest.mark.parametrize("twice", [False, True])
def test_the_sides_add_to_a_resnet_where_the_published_code_adds_them(twice: bool) -> None:
    model = resnet()
    adapter = tg.attach(model, tg.RepNet(twice=twice))
    sides = opened(adapter)
    assert len(sides) == 6
    with torch.no_grad():
        adapted = model.forward_features(images(side=64))
        tg.activate(model, None)
        x = model.maxpool(model.act1(model.bn1(model.conv1(images(side=64)))))
        x = x + sides[0](images(side=64))
        for number, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), start=1):
            side = sides[number](x)
            if twice and number == 1:
                # The form itself doubles what it returns; by hand, the two additions of the published code.
                sides[1].times = 1
                side = sides[1](x) + sides[1](x)
                sides[1].times = 2
            x = layer[0](x) + side
        x = layer[1](x)
        expected = layer[2](x) + sides[5](x)
    torch.testing.assert_close(adapted, expected)


def test_a_program_module_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    form = ProgramModule(8, 6, expand=2, kernel=3, ratio=2).eval()
    nn.init.normal_(form.final_bn.weight)
    u = torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        y = F.conv2d(F.avg_pool2d(u, 2), form.conv1.weight, padding=1, groups=2)
        y = F.conv2d(F.relu(y / (1 + 1e-3) ** 0.5), form.conv2.weight)
        y = y / (1 + 1e-3) ** 0.5 * form.final_bn.weight[:, None, None]
        expected = F.interpolate(y, size=(6, 6), mode="bilinear", align_corners=False)
        torch.testing.assert_close(form(u), expected)
    assert sum(p.numel() for p in form.parameters()) == 9 * 8 * 16 // 2 + 2 * 16 + 16 * 6 + 2 * 6


def test_a_standardised_convolution_has_filters_of_mean_zero_and_deviation_one() -> None:
    conv = StandardisedConv2d(4, 6, 3, padding=1, bias=False)
    nn.init.normal_(conv.weight, mean=3.0, std=5.0)
    x = torch.randn(1, 4, 5, 5)
    filters = conv.weight.detach().flatten(1)
    standard = (filters - filters.mean(1, keepdim=True)) / (filters.std(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(conv(x), F.conv2d(x, standard.view_as(conv.weight), padding=1))


def test_standardising_concerns_the_side_network_and_never_the_backbone() -> None:
    model = tiny("test_resnet")
    plain = model(images())
    adapter = tg.attach(model, tg.RepNet(standardise=True))
    assert torch.equal(model(images()), plain)
    for form in opened(adapter):
        assert isinstance(form.conv1, StandardisedConv2d) and isinstance(form.conv2, StandardisedConv2d)


def planned(name: str, method: tg.RepNet) -> list[Placement]:
    with torch.device("meta"):
        return method.placements(anatomy(name))


def test_the_published_kernels_do_not_depend_on_the_images_at_hand() -> None:
    with torch.device("meta"):
        small = tg.RepNet().placements(tg.anatomy(timm.create_model("resnet18", num_classes=0), input_size=64))
    kernels = [p.form.conv1.kernel_size[0] for p in small]
    assert kernels == [p.form.conv1.kernel_size[0] for p in planned("resnet18", tg.RepNet())] == [5, 5, 5, 5, 3]
    assert [p.form.conv1.kernel_size[0] for p in planned("resnet18", tg.RepNet(image_size=256))] == [5] * 5


@pytest.mark.parametrize(
    ("name", "homes"),
    [
        ("resnet50", ["maxpool", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "layer4.2"]),
        ("convnext_tiny", ["stem.1", *(f"stages.{i}.blocks.0" for i in range(4)), "stages.3.blocks.2"]),
        ("mobilenetv3_large_100", ["bn1.act", *(f"blocks.{i}.0" for i in range(6)), "blocks.5.2"]),
    ],
)
def test_the_sides_stand_beside_the_first_block_of_every_stage(name: str, homes: list[str]) -> None:
    assert [p.home for p in planned(name, tg.RepNet())] == homes


@pytest.mark.parametrize("side", [64, 65, 71, 78])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_the_sides_fit_their_blocks_at_any_image_size(backbone: str, side: int) -> None:
    model = tiny(backbone)
    opened(tg.attach(model, tg.RepNet()))
    assert model(images(side=side)).shape == (2, 3)


def test_the_sides_fit_under_gradient_checkpointing() -> None:
    model = resnet()
    adapter = tg.attach(model, tg.RepNet())
    opened(adapter)
    model(images(side=64)).square().mean().backward()
    plain = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(images(side=64)).square().mean().backward()
    again = [p.grad for p in adapter.parameters() if p.grad is not None]
    assert len(plain) == len(again) == len(list(adapter.parameters()))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_a_selection_keeps_the_sides_of_its_blocks() -> None:
    adapter = tg.attach(resnet(), tg.RepNet(), include="stages[3:]")
    assert [s.path for s in adapter.sites] == ["layer4.0", "layer4.2"]
    with pytest.raises(tg.GraftError, match=r"repnet: the selection leaves out every block.*layer1\.0"):
        tg.attach(resnet(), tg.RepNet(), include="layer4.1")


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny("test_vit"), r"repnet: block 'blocks\.0' of VisionTransformer does not work on"),
        (lambda: tiny("swin"), r"repnet: block 'layers\.0\.blocks\.0' of SwinTransformer does not work on"),
        (Signal, r"repnet: Signal was not seen to read an image"),
        (lambda: anatomy("vgg11").model, r"repnet: VGG has 0 stages.*use conv-adapter"),
    ],
)
def test_what_is_no_convnet_with_stages_is_refused_with_the_reason(model, message: str) -> None:
    with pytest.raises(tg.GraftError, match=message):
        tg.attach(model(), tg.RepNet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 0}, r"expand=0.*more than 0"),
        ({"kernel": 4}, r"kernel=4.*odd"),
        ({"kernel": -1}, r"kernel=-1.*at least 1"),
        ({"groups": 0}, r"groups=0.*at least 1"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(tg.GraftError, match=message):
        tg.RepNet(**options)
