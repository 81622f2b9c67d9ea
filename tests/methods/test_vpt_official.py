"""Checkpoints of VPT's official code: what is read from their shapes, and that they compute what they did."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import torchgraft as tg

from ..golden import hosts

CASES = Path(__file__).parents[1] / "golden" / "cases"


def _vit(mlp: float, **options: object) -> nn.Module:
    norm = partial(nn.LayerNorm, eps=1e-6)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
    return VisionTransformer(**small, mlp_ratio=mlp, norm_layer=norm, **options).eval()  # type: ignore[arg-type]


def _swin() -> nn.Module:
    config = {"img_size": 64, "patch_size": 4, "embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    return hosts.swin({**config, "window_size": 4, "mlp_ratio": 4}).eval()


def _convnext() -> nn.Module:
    config = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "layer_scale": True}
    return hosts.convnext({**config, "downsample_kernel": 2, "norm_eps": 1e-6}).eval()


def _resnet() -> nn.Module:
    config = {"block": "bottleneck", "layers": (1, 1, 1, 1), "planes": (8, 16, 32, 64), "stem_width": 64}
    return hosts.resnet(config).eval()


HOSTS = {
    "vpt_vit_shallow": (partial(_vit, 2), "vpt-shallow[num_tokens=5]", {}),
    "vpt_vit_deep": (partial(_vit, 2), "vpt-deep[num_tokens=4]", {}),
    "vpt_mae_vit_deep": (
        partial(_vit, 4, global_pool="avg", fc_norm=True),
        "vpt-deep[num_tokens=4, pool=all]",
        {"pool": "all"},
    ),
    "vpt_swin_deep": (_swin, "vpt-deep[num_tokens=3]", {}),
    "vpt_convnext_pad": (_convnext, "vpt-pad[prompt_size=3, image_size=64]", {}),
    "vpt_resnet_below": (
        _resnet,
        "vpt-below[num_channels=2, image_size=32]",
        {},
    ),
}


def _tensors(case: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    tensors = load_file(CASES / f"{case}.safetensors")
    state = {k.removeprefix("state/"): t for k, t in tensors.items() if k.startswith("state/")}
    return state, tensors["input/image"], tensors["output/logits"]


@pytest.mark.parametrize("case", HOSTS)
def test_a_checkpoint_tells_its_method_and_computes_what_it_did(case: str) -> None:
    make, method, options = HOSTS[case]
    state, image, logits = _tensors(case)
    model = make()
    adapter = tg.load_official(model, {"model": state}, system="vpt", backbone="load", **options)
    assert str(adapter.method) == method
    assert adapter.num_classes == 5
    with torch.no_grad():
        torch.testing.assert_close(model(image), logits, rtol=1e-4, atol=1e-5)


def test_prompts_alone_load_onto_a_backbone_that_is_there() -> None:
    state, image, logits = _tensors("vpt_vit_deep")
    model = _vit(2)
    tg.load_official(model, state, system="vpt", name="first", backbone="load")
    own = {k: t for k, t in state.items() if "prompt" in k or "head" in k}
    tg.load_official(model, own, system="vpt", name="second")
    with torch.no_grad():
        torch.testing.assert_close(model(image), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "options", "method"),
    [
        ({"prompt_embeddings": (1, 17, 32)}, {}, "vpt-add"),
        ({"prompt_embeddings": (1, 17, 32)}, {"location": "prepend"}, "vpt-shallow[num_tokens=17]"),
        ({"prompt_embeddings": (1, 1, 32)}, {"location": "add-1"}, "vpt-add[location=add-1]"),
        ({"prompt_embeddings": (1, 17, 32), "deep_prompt_embeddings": (2, 17, 32)}, {}, "vpt-add[deep=true]"),
        ({"prompt_embeddings": (1, 3, 4, 12)}, {}, "vpt-shallow[num_tokens=3, start=pixel]"),
        (
            {"deep_prompt_embeddings": (2, 4, 32)},
            {"reverse": True, "official": True},
            "vpt-deep[num_tokens=4, num_layers=2, reverse=true, official=true]",
        ),
        (
            {"prompt_embeddings": (1, 4, 6), "prompt_proj.weight": (32, 6), "prompt_proj.bias": (32,)},
            {},
            "vpt-shallow[num_tokens=4, project=6]",
        ),
        (
            {
                "prompt_embeddings": (1, 2, 16, 16),
                "embeddings.patch_embeddings.weight": (32, 5, 4, 4),
                "embeddings.patch_embeddings.bias": (32,),
            },
            {},
            "vpt-below[num_channels=2, image_size=16]",
        ),
        (
            {"prompt_embeddings": (1, 4, 32), "deep_prompt_embeddings": (2, 4, 32)},
            {"shared": True},
            "vpt-deep[num_tokens=4, shared=true]",
        ),
    ],
)
def test_every_location_is_read_from_the_shapes(shapes: dict, options: dict, method: str) -> None:
    torch.manual_seed(0)
    state = {f"enc.transformer.{name}": torch.randn(shape) for name, shape in shapes.items()}
    adapter = tg.load_official(_vit(2), state, system="vpt", **options)
    assert str(adapter.method) == method
    owned = sorted(t.sum().item() for t in adapter.state_dict().values())
    used = [t for n, t in state.items() if not (options.get("shared") and "deep" in n)]
    torch.testing.assert_close(torch.tensor(owned), torch.tensor(sorted(t.sum().item() for t in used)))


def test_a_state_without_prompts_is_refused() -> None:
    with pytest.raises(tg.GraftError, match=r"vpt: the state holds no 'prompt_embeddings'"):
        tg.load_official(_vit(2), {"head.last_layer.bias": torch.zeros(5)}, system="vpt")


@pytest.mark.parametrize("key", ["enc.transformer.encoder.layer.0.attn.rotary.weight", "something.weight"])
def test_a_key_of_another_system_is_refused(key: str) -> None:
    state, _, _ = _tensors("vpt_vit_deep")
    with pytest.raises(tg.GraftError, match=rf"unknown key '{key}'"):
        tg.load_official(_vit(2), {**state, key: torch.zeros(1)}, system="vpt")
