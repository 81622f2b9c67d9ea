"""(IA)^3: counts, what it scales, and the same outputs as peft's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

import torchgraft as tg
from torchgraft.methods import IA3

from ..core.attaching import assert_close, disturb, run
from .networks import SIDE, count, images, tiny
from .peft_layers import LAYERS, Host

COUNTS = [
    ("vit_base_patch16_224", "ia3", 12 * (2 * 768 + 3072)),
    ("vit_base_patch16_224", "ia3[feedforward=[]]", 12 * 2 * 768),
    ("vit_base_patch16_224", "ia3[targets=[q, k, v]]", 12 * (3 * 768 + 3072)),
    ("swin_base_patch4_window7_224", "ia3", 6 * (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024)),
    ("convnext_tiny", "ia3", 5 * (3 * 96 + 3 * 192 + 9 * 384 + 3 * 768)),
    ("resnet50", "ia3", 3 * 64 + 4 * 128 + 6 * 256 + 3 * 512),
]


@pytest.mark.parametrize(("backbone", "method", "wanted"), COUNTS)
def test_the_number_of_parameters_is_that_of_the_formula(backbone: str, method: str, wanted: int) -> None:
    assert count(backbone, method) == wanted


def test_the_default_takes_55_296_parameters_on_vit_base() -> None:
    assert count("vit_base_patch16_224", "ia3") == 55_296


def scaled(adapter: tg.Adapter) -> dict[str, Tensor]:
    return {n.rpartition("/")[2]: t for n, t in adapter.state_dict().items()}


def test_keys_values_and_the_input_of_fc2_are_scaled() -> None:
    model, x = tiny("test_vit"), images()
    block, seen = model.blocks[0], {}
    for name in ("attn.qkv", "mlp.fc2"):
        block.get_submodule(name).register_forward_hook(lambda m, a, out, n=name: seen.__setitem__(n, (a[0], out)))
    run(model, x)
    plain = dict(seen)
    own = scaled(disturb(tg.attach(model, "ia3", include="blocks.0")))
    run(model, x)
    ones = torch.ones(64)
    factors = torch.cat([ones, own["k.scale"], own["v.scale"]])
    assert_close(seen["attn.qkv"][1], plain["attn.qkv"][1] * factors)
    (read, returned), fc2 = seen["mlp.fc2"], block.mlp.fc2
    assert_close(returned, nn.functional.linear(read * own["input.scale"], fc2.weight, fc2.bias).detach())


def test_an_input_scale_is_a_scale_of_the_columns_of_the_weight() -> None:
    torch.manual_seed(0)
    model, x = Host(nn.Linear(6, 12)), torch.randn(3, 6)
    own = disturb(tg.attach(model, "ia3[targets=all, feedforward=[layer]]", include="layer", example=((x,), {})))
    (scale,) = own.state_dict().values()
    layer = model.layer
    assert_close(model(x).detach(), nn.functional.linear(x * scale, layer.weight, layer.bias).detach())


CASES: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": SIDE},
    "swinv2_tiny_window8_256": {"depths": (1,), "embed_dim": 8, "num_heads": (2,), "img_size": 64},
    "eva02_tiny_patch14_224": {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 28, "qkv_fused": True},
}


@pytest.mark.parametrize("name", CASES)
def test_biases_that_the_attention_keeps_apart_are_scaled_with_the_weight(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **CASES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    side = CASES[name]["img_size"]
    x = torch.randn(2, 3, side, side)
    adapter = disturb(tg.attach(model, "ia3[feedforward=[]]", example=((x,), {})))
    own = scaled(adapter)
    apart, attention = run(model, x), next(m for n, m in model.named_modules() if n.endswith("attn"))
    tg.detach(model)
    with torch.no_grad():
        for part, rows in (("k", 1), ("v", 2)):
            scale = own[f"{part}.scale"]
            attention.qkv.weight.view(3, scale.numel(), -1)[rows].mul_(scale[:, None])
            bias = getattr(attention, f"{part}_bias", None)
            if bias is not None:
                bias.mul_(scale)
    assert_close(run(model, x), apart)


def test_the_projections_of_nn_multihead_attention_are_scaled_with_their_biases() -> None:
    torch.manual_seed(0)
    for options in ({}, {"kdim": 6, "vdim": 5}):
        model = Attention(options)
        x = [torch.randn(2, 5, 8), torch.randn(2, 4, options.get("kdim", 8)), torch.randn(2, 4, options.get("vdim", 8))]
        adapter = disturb(tg.attach(model, "ia3[targets=[q, k, v]]", include="attention", example=(tuple(x), {})))
        apart, own = run(model, *x), scaled(adapter)
        tg.merge(model, probe=(tuple(x), {}))
        assert_close(run(model, *x), apart)
        tg.unmerge(model)
        tg.detach(model)
        attention = model.attention
        with torch.no_grad():
            for i, part in enumerate("qkv"):
                scale = own[f"{part}.scale"]
                rows = slice(8 * i, 8 * i + 8)
                if options:
                    getattr(attention, f"{part}_proj_weight").mul_(scale[:, None])
                else:
                    attention.in_proj_weight[rows] *= scale[:, None]
                attention.in_proj_bias[rows] *= scale
        assert_close(run(model, *x), apart)


class Attention(nn.Module):
    def __init__(self, options: dict[str, int]) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        nn.init.normal_(self.attention.in_proj_bias)
        self.eval()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, need_weights=False)[0]


def test_a_whole_projection_with_its_biases_apart_is_refused() -> None:
    model = timm.create_model("beit_base_patch16_224", **CASES["beit_base_patch16_224"])
    with pytest.raises(tg.GraftError, match=r"^ia3: the biases .* kept apart .* use targets=\[q, k, v\]"):
        tg.attach(model, "ia3[targets=qkv]")


def test_a_single_block_is_adapted_too() -> None:
    block, x = EncoderBlock(2, 8, 16, 0.0, 0.0, nn.LayerNorm).eval(), torch.randn(2, 5, 8)
    adapter = disturb(tg.attach(block, "ia3", example=((x,), {})))
    assert adapter.num_parameters() >= 16


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet", "swin"])
def test_it_merges_completely(backbone: str) -> None:
    model = tiny(backbone)
    disturb(tg.attach(model, "ia3"))
    apart = run(model, images())
    assert tg.merge(model).complete
    assert_close(run(model, images()), apart, 1e-4)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "conv1d"])  # which peft does not support
def test_outputs_and_gradients_are_those_of_peft(kind: str, inputs: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    ours, theirs, x = Host(make()), Host(make()), torch.randn(shape)
    theirs.load_state_dict(ours.state_dict())
    fed = ["layer"] if inputs else []
    reference = peft.get_peft_model(theirs, peft.IA3Config(target_modules=["layer"], feedforward_modules=fed))
    method = IA3(targets="all", feedforward=tuple(fed))
    adapter = disturb(tg.attach(ours, method, include="layer", example=((x,), {})))
    (mine,) = adapter.parameters()
    other = reference.base_model.model.layer.ia3_l["default"]
    with torch.no_grad():
        other.copy_(mine.view_as(other))
    assert_close(ours(x), reference(x))
    ours(x).square().sum().backward()
    reference(x).square().sum().backward()
    assert_close(mine.grad, other.grad.view_as(mine))


def test_a_model_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(tg.GraftError, match=r"^ia3: no weight for targets conv is selected"):
        tg.attach(tiny("test_vit"), "ia3[targets=conv, feedforward=[]]")
