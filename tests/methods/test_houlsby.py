"""Houlsby adapters: behind every sub-layer, in front of all that stands between it and the residual sum."""

from __future__ import annotations

import pytest
import torch
from timm.models import VisionTransformer

import torchgraft as tg
from torchgraft.methods import Houlsby

from .networks import count, images
from .watching import record, spread


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("houlsby", 313_536),
        ("houlsby[sites=[attn]]", 156_768),
        ("houlsby[attn_layer_norm=in]", 313_536 + 12 * 2 * 768),
        ("houlsby[width=64]", 24 * (2 * 64 * 768 + 64 + 768)),
    ],
)
def test_houlsby_adapters_have_the_published_size(method: str, size: int) -> None:
    assert count("vit_base_patch16_224", method) == size


def test_an_adapter_changes_what_the_sub_layer_returns_in_front_of_layer_scale() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3, init_values=0.5
    ).eval()
    returned, scaled = record(model, "blocks.0.attn.proj", "output"), record(model, "blocks.0.ls1", "output")
    model(images())
    adapter = tg.attach(model, Houlsby(attn_layer_norm="in"))
    attention, mlp = (spread(p.form) for _, p in adapter.placements)
    assert [p.home for _, p in adapter.placements] == ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]
    assert hasattr(attention.norm, "weight") and not hasattr(mlp.norm, "weight")
    model(images())
    wanted = returned[0] + attention(returned[0])
    torch.testing.assert_close(scaled[-1], wanted * model.blocks[0].ls1.gamma)


def test_only_the_chosen_sub_layers_are_adapted() -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    adapter = tg.attach(model, Houlsby(sites=("mlp",)), include="blocks.1")
    assert [p.home for _, p in adapter.placements] == ["blocks.1.mlp.fc2"]
