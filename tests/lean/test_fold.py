"""A BatchNorm computed in the weight before it."""

from __future__ import annotations

import gc

import pytest
import timm
import timm.layers as tl
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.lean.fold import FoldsNorm, folding_always
from torchgraft.lean.meter import saved_bytes
from torchgraft.swap import has_layer


def _stir(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(norm.weight, 0.5, 1.2, generator=generator)
            nn.init.normal_(norm.bias, 0, 0.2, generator=generator)
    return model


class Pair(nn.Module):
    """First an adapted layer, so that what follows has a backward."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.conv, self.norm = nn.Conv2d(3, 4, 1), conv, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.first(x)))


class ReadTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        return self.norm(y) + y


X = torch.randn(2, 3, 33, 32, generator=torch.Generator().manual_seed(3))
EXAMPLE = ((X[:1],), {})
CONVS = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv without bias, stride": lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False),
    "grouped, dilated": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
    "same": lambda: tl.Conv2dSame(4, 6, 3, stride=2),
    "padding='same'": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
}


def _attached(model: nn.Module, **options: object) -> tg.Adapter:
    options = {"lean": False, "example": EXAMPLE, "include": "first"} | options
    return tg.attach(model, "lora[rank=2]", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("lean", [False, "exact"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, tl.BatchNormAct2d, lambda n: nn.BatchNorm2d(n, affine=False)])
@pytest.mark.parametrize("conv", CONVS)
def test_outputs_and_gradients_move_by_rounding_only(conv: str, norm, lean) -> None:
    torch.manual_seed(0)
    model = Pair(CONVS[conv](), norm(6))
    for module in (model.norm,):
        module.running_mean.normal_(0, 0.2)
        module.running_var.uniform_(0.5, 1.5)
    adapter = _attached(model, lean=lean)
    assert has_layer(model.conv, FoldsNorm)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    found = []
    for fold in (True, False):
        adapter.fold = fold
        tg.activate(model, "default")
        model.zero_grad()
        out = model(X)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in adapter.parameters())])
    for a, b in zip(*found, strict=True):
        assert 0 <= float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
    assert not torch.equal(found[0][0], found[1][0])


def test_inference_gives_the_bits_of_the_backbone() -> None:
    model = _stir(timm.create_model("resnet10t", num_classes=4)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        tg.attach(model, "conv-adapter")
        assert torch.equal(model(x), before)
        with folding_always():
            folded = model(x)
    assert not torch.equal(folded, before)
    torch.testing.assert_close(folded, before, rtol=1e-4, atol=1e-5)


def test_the_backbone_s_parameters_stay_what_they_are() -> None:
    model = _stir(timm.create_model("resnet10t", num_classes=4))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    tg.attach(model, "conv-adapter", num_classes=3)
    model.train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    now = model.state_dict()
    assert all(torch.equal(now[n], t) for n, t in state.items())


def test_a_convolution_that_somebody_else_reads_too_is_not_folded() -> None:
    torch.manual_seed(0)
    model = ReadTwice(nn.Conv2d(4, 6, 3, padding=1), _stir(nn.BatchNorm2d(6)))
    _attached(model)
    assert not has_layer(model.conv, FoldsNorm)


@pytest.mark.parametrize(
    "method, folds", [("norm-tuning", False), ("ssf", False), ("lora[targets=conv]", False), ("conv-adapter", True)]
)
def test_nothing_is_folded_where_the_method_acts_between_the_two_or_on_them(method: str, folds: bool) -> None:
    model = _stir(timm.create_model("resnet10t", num_classes=4))
    tg.attach(model, method, num_classes=3, lean=False)
    bonds = {id(m.__dict__["_fold"]): m.__dict__["_fold"] for m in model.modules() if "_fold" in m.__dict__}
    adapted = [b for b in bonds.values() if b.conv is model.layer2[0].conv2]
    assert [not (b.conv_paused or b.norm_paused) for b in adapted] == [folds]


def test_small_maps_are_left_to_the_norm() -> None:
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(4, 64, 3, padding=1), nn.BatchNorm2d(64))
    model.norm.running_mean.normal_()
    _attached(model)
    own = [*model.parameters(), *model.buffers()]
    small, large = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 32, 32)
    # The norm keeps its input where it runs as one; where it is folded there is none.
    assert saved_bytes(lambda: model(small), [*own, small]) > 64 * 4 * 4
    assert saved_bytes(lambda: model(large), [*own, large]) < 64 * 32 * 32 * 4


def test_folding_is_undone_with_the_last_adapter() -> None:
    model = timm.create_model("resnet10t", num_classes=4)
    classes = [type(m) for m in model.modules()]
    tg.attach(model, "conv-adapter")
    assert any("_fold" in m.__dict__ for m in model.modules())
    tg.detach(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("_fold" in m.__dict__ for m in model.modules())


def test_no_folded_weight_stays_in_memory_between_forward_and_backward() -> None:
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(4, 7, 3, padding=1), _stir(nn.BatchNorm2d(7)))
    _attached(model, lean="exact")
    out = model(X)
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (7, 4, 3, 3)]
    assert alive == []
    out.sum().backward()
