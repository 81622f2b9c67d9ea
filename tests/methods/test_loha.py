"""LoHa: counts, when it follows the input, and the same outputs as peft's."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.layers import ConvGeometry, is_conv
from torchgraft.methods import LoHa
from torchgraft.methods.forms.lycoris import HadamardAlong, hadamard

from ..core.attaching import assert_close
from ..core.layer_kinds import CONVS, build, inputs
from .networks import count
from .peft_layers import LAYERS, Host, assert_same_as_peft


def test_the_number_of_parameters_is_twice_that_of_lora() -> None:
    assert count("vit_base_patch16_224", "loha") == 2 * count("vit_base_patch16_224", "lora") == 589_824
    assert count("resnet50", "loha") == 2 * count("resnet50", "lora")


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_peft(kind: str, rank: int, effective: bool) -> None:
    config = peft.LoHaConfig(r=rank, alpha=5, target_modules=["layer"], use_effective_conv2d=effective)
    method = LoHa(rank=rank, alpha=5, targets="all", use_effective_conv2d=effective)
    # peft's own backward of the Tucker form takes the one product's factors for the other's gradient.
    assert_same_as_peft(kind, method, config, "hada_", gradients=not effective or kind in ("linear", "1x1 conv"))


def test_gradients_of_the_tucker_form_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    form = hadamard((4, 3, 2, 2), 2, 1.0, effective=True).double()
    parameters = list(form.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter)
    names = [n for n, _ in form.named_parameters()]

    def delta(*values: Tensor) -> Tensor:
        return torch.func.functional_call(form, dict(zip(names, values, strict=True)), ())

    assert torch.autograd.gradcheck(delta, parameters)


@pytest.mark.parametrize("kind", ["linear", *CONVS])
def test_following_the_input_is_what_the_product_gives(kind: str) -> None:
    torch.manual_seed(0)
    layer = build(kind)
    if getattr(layer, "groups", 1) > 1:
        return
    form = HadamardAlong(layer.weight.shape, 2, 0.5)
    for parameter in form.parameters():
        nn.init.normal_(parameter)
    geometry = ConvGeometry.of(layer) if is_conv(layer) else None
    for x in inputs(kind):
        wanted = geometry.apply(x, form(), 1) if geometry else nn.functional.linear(x, form())
        assert_close(form.along(x, geometry).detach(), wanted.detach())


def test_it_follows_the_input_only_where_that_is_less_work() -> None:
    assert hasattr(hadamard((100, 200), 8, 1.0, effective=False), "along")
    assert not hasattr(hadamard((64, 200), 8, 1.0, effective=False), "along")
    assert hasattr(hadamard((100, 100, 1, 1), 8, 1.0, effective=True), "along")
    assert not hasattr(hadamard((100, 100, 3, 3), 8, 1.0, effective=True), "along")


def test_the_rank_is_at_most_the_smaller_side() -> None:
    adapter = tg.attach(Host(nn.Conv2d(32, 32, 3, groups=32)), "loha[rank=32, targets=all]", include="layer")
    assert adapter.num_parameters() == 2 * 9 * (32 + 9)
