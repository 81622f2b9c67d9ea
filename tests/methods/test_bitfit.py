"""BitFit: what counts as a bias."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

import torchgraft as tg

from .networks import SIDE, images, tiny, train_step


def leaves(adapter: tg.Adapter) -> set[str]:
    """The parameters' own names."""
    return {key.rpartition(".")[2] for key in adapter.state_dict()}


def test_every_parameter_called_bias_trains_and_nothing_else() -> None:
    model = tiny("test_vit", num_classes=0)
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    adapter = tg.attach(model, tg.BitFit())
    assert leaves(adapter) == {"bias"}
    assert len(adapter.state_dict()) == len(biases)


def test_biases_that_attention_holds_for_its_fused_projection_count_too() -> None:
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=12, num_heads=2, img_size=SIDE, num_classes=0)
    assert leaves(tg.attach(beit, tg.BitFit())) == {"bias", "q_bias", "v_bias"}
    block = EncoderBlock(2, 8, 16, 0.0, 0.0, nn.LayerNorm)
    adapter = tg.attach(block, tg.BitFit(), example=((torch.zeros(1, 5, 8),), {}))
    assert leaves(adapter) == {"bias", "in_proj_bias"}
    train_step(adapter, batch=torch.randn(2, 5, 8))
    assert all(p.grad is not None for p in adapter.parameters())


def test_tables_of_relative_positions_train_only_when_asked_for() -> None:
    assert leaves(tg.attach(tiny("swin"), tg.BitFit())) == {"bias"}
    adapter = tg.attach(tiny("swin"), tg.BitFit(tables=True))
    assert leaves(adapter) == {"bias", "relative_position_bias_table"}


def test_created_biases_start_at_zero_behind_the_convolutions_of_the_blocks() -> None:
    model = tiny("test_resnet")
    plain = model(images())
    adapter = tg.attach(model, tg.BitFit(create=True))
    created = {key: t for key, t in adapter.state_dict().items() if key.endswith("/bias.shift")}
    assert created and all(not t.any() for t in created.values())
    assert all("blocks[" in key and "downsample" not in key for key in created)
    assert torch.equal(model(images()), plain)


def test_a_created_bias_acts_like_one_the_convolution_was_built_with() -> None:
    model = tiny("test_resnet")
    adapter = tg.attach(model, tg.BitFit(create=True))
    conv = model.layer1[0].conv1
    shift = dict(adapter.named_parameters())["stages[0].blocks[0].conv1/bias.shift"]
    with torch.no_grad():
        shift.normal_()
        x = torch.randn(1, conv.in_channels, 5, 5)
        built = nn.functional.conv2d(x, conv.weight, shift, conv.stride, conv.padding)
        torch.testing.assert_close(conv(x), built)


def test_a_network_without_blocks_gets_biases_on_all_convolutions_behind_the_stem() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    with pytest.raises(tg.GraftError, match=r"bitfit: no bias is selected on Sequential; use bitfit\[create=true\]"):
        tg.attach(model, tg.BitFit())
    adapter = tg.attach(model, tg.BitFit(create=True))
    assert [s.path for s in adapter.sites] == ["2"]
