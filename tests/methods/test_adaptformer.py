"""AdaptFormer: beside the MLP, on the stream in front of its norm, outside LayerScale and DropPath."""

from __future__ import annotations

import pytest
import torch
from timm.models import VisionTransformer

import torchgraft as tg
from torchgraft.methods import AdaptFormer

from .networks import count, images
from .watching import record, spread


def test_adaptformer_has_the_published_size() -> None:
    assert count("vit_base_patch16_224", "adaptformer") == 156_768


@pytest.mark.parametrize(("adapter_input", "side"), [("pre_norm", "input"), ("post_norm", "output")])
def test_the_bottleneck_reads_the_stream_on_the_chosen_side_of_the_norm(adapter_input: str, side: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3, init_values=0.1
    ).eval()
    x = record(model, "blocks.0.norm2", side)  # type: ignore[arg-type]
    block = record(model, "blocks.0", "output")
    model(images())
    adapter = tg.attach(model, AdaptFormer(adapter_input=adapter_input))  # type: ignore[arg-type]
    form = spread(adapter.placements[0][1].form)
    model(images())
    bottleneck = form.up(torch.relu(form.down(x[0])))
    torch.testing.assert_close(block[-1] - block[0], 0.1 * bottleneck, rtol=1e-4, atol=1e-5)
