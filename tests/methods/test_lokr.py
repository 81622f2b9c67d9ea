"""LoKr: counts, the factors it chooses, and the same outputs as peft's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

import torchgraft as tg
from torchgraft.core.layers import ConvGeometry, is_conv
from torchgraft.methods import LoKr
from torchgraft.methods.forms.lycoris import KroneckerDelta, split

from ..core.attaching import assert_close
from ..core.layer_kinds import CONVS, build, inputs
from .networks import count
from .peft_layers import LAYERS, assert_same_as_peft

COUNTS = [
    ("lokr", 12 * 2 * (24 * 24 + 8 * (32 + 32))),
    ("lokr[rank=16]", 12 * 2 * (24 * 24 + 32 * 32)),
    ("lokr[rank=4, decompose_both=true]", 12 * 2 * 4 * (24 + 24 + 32 + 32)),
    ("lokr[decompose_factor=8]", 12 * 2 * (8 * 8 + 8 * (96 + 96))),
]


@pytest.mark.parametrize(("method", "wanted"), COUNTS)
def test_the_number_of_parameters_is_that_of_the_formula(method: str, wanted: int) -> None:
    assert count("vit_base_patch16_224", method) == wanted


def test_the_default_takes_26_112_parameters_on_vit_base() -> None:
    assert count("vit_base_patch16_224", "lokr") == 26_112


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 5, 8, 16, 100])
def test_sizes_are_split_as_peft_splits_them(factor: int) -> None:
    for size in (1, 2, 7, 12, 36, 96, 127, 128, 192, 256, 384, 768, 1000, 3072):
        assert split(size, factor) == factorization(size, factor)


OPTIONS: list[dict[str, Any]] = [
    {"rank": 1},
    {"rank": 2, "decompose_both": True},
    {"rank": 1, "decompose_both": True, "decompose_factor": 3},
    {"rank": 16, "decompose_factor": 3},
    {"rank": 2, "use_effective_conv2d": True, "decompose_factor": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_peft(kind: str, options: dict[str, Any]) -> None:
    if kind == "conv1d" and options["rank"] > 1:
        pytest.skip("peft multiplies the wrong axes of a whole kernel of one dimension")
    config = peft.LoKrConfig(
        r=options["rank"],
        alpha=5,
        target_modules=["layer"],
        **{k: v for k, v in options.items() if k != "rank"},
    )
    assert_same_as_peft(kind, LoKr(alpha=5, targets="all", **options), config, "lokr_")


@pytest.mark.parametrize("kind", ["linear", *CONVS])
def test_following_the_input_is_what_the_product_gives(kind: str) -> None:
    torch.manual_seed(0)
    layer = build(kind)
    if getattr(layer, "groups", 1) > 1:
        return
    form = KroneckerDelta(layer.weight.shape, 1, 0.5, factor=2)
    for parameter in form.parameters():
        nn.init.normal_(parameter)
    geometry = ConvGeometry.of(layer) if is_conv(layer) else None
    for x in inputs(kind):
        wanted = geometry.apply(x, form(), 1) if geometry else nn.functional.linear(x, form())
        assert_close(form.along(x, geometry).detach(), wanted.detach())


def test_a_whole_kernel_of_one_dimension_is_the_product_that_the_formula_says() -> None:
    torch.manual_seed(0)
    form = KroneckerDelta((10, 6, 3), 16, 1.0)
    nn.init.normal_(form.w1)
    for tap in range(3):
        assert torch.allclose(form()[..., tap], torch.kron(form.w1, form.w2[..., tap]))


def test_a_factor_below_one_is_refused() -> None:
    with pytest.raises(tg.GraftError, match="decompose_factor=0"):
        LoKr(decompose_factor=0)
