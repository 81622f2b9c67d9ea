"""KronA: parameter counts, the product and its two forms, where the branches sit."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as hf
from torch import nn

import torchgraft as tg
from torchgraft.core.layers import ConvGeometry
from torchgraft.errors import GraftError
from torchgraft.methods.forms.kronecker import Kronecker, balanced_split, kron_apply, kron_delta
from torchgraft.methods.krona import KronA, KronAB, KronABRes

from .networks import count, images, tiny, train_step

VIT = "vit_base_patch16_224"

# -- counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "number"),
    [
        (KronA(), 12 * 2 * 1_536),  # 36,864
        (KronA(targets=("q", "k", "v", "proj", "fc1", "fc2")), 147_456),
        (KronA(a_shape=(24, 24)), 12 * 2 * 1_600),
        (KronAB(), 18_432),
        (KronABRes(), 18_444),
    ],
)
def test_vit_base_has_the_number_of_parameters_of_the_formula(method: tg.Method, number: int) -> None:
    assert count(VIT, method) == number


@functools.cache
def t5_base() -> tg.Anatomy:
    config = hf.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        return tg.anatomy(hf.T5ForConditionalGeneration(config))


@pytest.mark.parametrize(("method", "number"), [(KronA(), 110_592), (KronAB(), 36_864), (KronABRes(), 36_864 + 24)])
def test_t5_base_has_the_number_of_parameters_of_the_formula(method: tg.Method, number: int) -> None:
    with torch.device("meta"):
        placed = method.placements(t5_base())
    assert sum(p.numel() for placement in placed for p in placement.parameters()) == number


@pytest.mark.parametrize(
    ("sizes", "split"), [((768, 768), (32, 24)), ((768, 3072), (48, 32)), ((7, 7), (7, 1)), ((1, 1), (1, 1))]
)
def test_the_default_split_has_the_fewest_parameters(sizes: tuple[int, int], split: tuple[int, int]) -> None:
    assert balanced_split(*sizes) == split


# -- the product ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6, 6, 4), (3, 4, 8, 6), (24, 1, 1, 30), (1, 5, 24, 2)])
def test_two_small_products_equal_the_kronecker_product(shape: tuple[int, int, int, int]) -> None:
    a1, a2, b1, b2 = shape
    a, b, x = torch.randn(a1, a2), torch.randn(b1, b2), torch.randn(2, 3, a1 * b1)
    torch.testing.assert_close(kron_apply(x, a, b), x @ torch.kron(a, b))
    torch.testing.assert_close(kron_delta(a, b), torch.kron(a, b).T)


@pytest.mark.parametrize(
    "options", [{"stride": 2, "padding": 1}, {"dilation": 2}, {"padding_mode": "reflect", "padding": 1}]
)
def test_beside_a_convolution_b_is_a_kernel(options: dict) -> None:
    conv = nn.Conv2d(8, 12, 3, **options)
    form = Kronecker(conv.weight.shape, (2, 3), 1.5)
    nn.init.normal_(form.b)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        plain = conv(x)
        along = form.along(x, ConvGeometry.of(conv))
        conv.weight.add_(form())
        torch.testing.assert_close(plain + along, conv(x))


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 2, "padding": 1}])
def test_a_pointwise_convolution_may_skip_pixels_or_pad(options: dict) -> None:
    conv = nn.Conv2d(8, 12, 1, bias=False, **options)
    form = Kronecker(conv.weight.shape, (2, 3), 1.5)
    nn.init.normal_(form.b)
    x = torch.randn(2, 8, 9, 9)
    along = form.along(x, ConvGeometry.of(conv))
    conv.weight = nn.Parameter(form())
    torch.testing.assert_close(along, conv(x))


def test_the_start_of_the_zero_factor_lets_the_gradient_through() -> None:
    adapter = tg.attach(tiny("test_vit"), KronA())
    adapter.model(images()).square().mean().backward()
    grads = {name.rpartition(".")[2]: p.grad for name, p in adapter.named_parameters()}
    assert grads["b"].abs().max() > 0
    assert grads["a"].abs().max() == 0


def test_square_factors_give_a_change_of_full_rank_where_lora_gives_one_of_rank_one() -> None:
    form = Kronecker((36, 36), (6, 6))
    nn.init.normal_(form.b)
    assert torch.linalg.matrix_rank(form()) == 36
    flat = Kronecker((36, 36), (9, 4))
    nn.init.normal_(flat.b)
    assert torch.linalg.matrix_rank(flat()) == 16


def test_merging_adds_the_transposed_product_to_the_weight() -> None:
    model = tiny("test_vit")
    adapter = tg.attach(model, KronA(targets=("proj",), scale=2.0))
    train_step(adapter)
    layer = model.get_submodule(adapter.sites[0].path)
    before, form = layer.weight.detach().clone(), adapter.placements[0][1].form
    tg.merge(model)
    torch.testing.assert_close(layer.weight - before, 2.0 * torch.kron(form.a, form.b).T, rtol=1e-3, atol=1e-6)


def test_a_split_that_does_not_divide_names_the_layer_and_one_that_does() -> None:
    message = r"krona: at '.*attn.qkv' a_shape=\[5, 4\] does not divide a weight of 64 inputs and 64 outputs"
    with pytest.raises(GraftError, match=message):
        tg.attach(tiny("test_vit"), KronA(a_shape=(5, 4)))
    with pytest.raises(GraftError, match=r"krona-b: beside the MLP of 'blocks.0' a_shape=\[5, 4\]"):
        tg.attach(tiny("test_vit"), KronAB(a_shape=(5, 4)))


# -- beside the MLP -------------------------------------------------------------------------------------


def moved(method: tg.Method) -> tuple[nn.Module, nn.Module]:
    """A ViT and the form of its first branch, away from the start."""
    model = tiny("test_vit")
    adapter = tg.attach(model, method, include="blocks.0")
    form = adapter.placements[0][1].form
    nn.init.normal_(form.b)
    return model, form


@pytest.mark.parametrize("side", ["post_norm", "pre_norm"])
def test_the_branch_reads_in_front_of_or_behind_the_norm(side: str) -> None:
    model, form = moved(KronABRes(adapter_input=side, scale=2.0, residual_init=0.5))
    block = model.blocks[0]
    x = torch.randn(2, 5, 64)
    found = block(x)
    tg.activate(model, None)
    middle = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    n = block.norm2(middle) if side == "post_norm" else middle
    torch.testing.assert_close(found, block(x) + 2.0 * n @ torch.kron(form.a, form.b) + 0.5 * n)


def test_the_branches_stay_when_the_rest_is_merged() -> None:
    model, _ = moved(KronAB())
    report = tg.merge(model)
    assert not report.complete
    assert [site.merged for site in report.sites] == [False]


@pytest.mark.parametrize(("start", "identity"), [(0.0, True), (1.0, False)])
def test_only_a_residual_of_zero_starts_as_the_pretrained_network(start: float, identity: bool) -> None:
    model = tiny("test_vit")
    before = model(images())
    tg.attach(model, KronABRes(residual_init=start))
    assert torch.allclose(model(images()), before, atol=1e-6) is identity
