from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import torchgraft as tg
from torchgraft.core.placements import Layout, Point


def layouts(name: str, block: str, **options: object) -> tuple[Layout, Layout]:
    """Layout at the input and at the output of one block."""
    with torch.device("meta"):
        found = tg.anatomy(timm.create_model(name, **options))
    return found.layout(Point(block, "input")), found.layout(Point(block, "output"))


@pytest.mark.parametrize(
    ("name", "block", "prefix", "grid"),
    [
        ("vit_tiny_patch16_224", "blocks.0", 1, (14, 14)),
        ("deit_tiny_distilled_patch16_224", "blocks.0", 2, (14, 14)),
        ("vit_small_patch14_reg4_dinov2", "blocks.0", 5, (37, 37)),
        ("vit_base_patch32_clip_224", "blocks.0", 1, (7, 7)),
        ("beit_base_patch16_224", "blocks.0", 1, (14, 14)),
        ("mixer_s32_224", "blocks.0", 0, (7, 7)),
        ("cait_xxs24_224", "blocks.0", 0, (14, 14)),
        ("vit_tiny_r_s16_p8_224", "blocks.0", 1, (7, 7)),
        # pyramids: every stage has its own grid, CoaT and PiT carry a class token along
        ("pvt_v2_b0", "stages.3.blocks.0", 0, (7, 7)),
        ("twins_svt_small", "blocks.1.0", 0, (28, 28)),
        ("coat_tiny", "serial_blocks3.0", 1, (14, 14)),
        ("pit_ti_224", "transformers.1.blocks.0", 1, (14, 14)),
        ("levit_128s", "stages.2.blocks.0", 0, (4, 4)),
        ("crossvit_tiny_240", "blocks.1.blocks.1.0", 1, (14, 14)),
    ],
)
def test_tokens_are_known_by_their_prefix_and_grid(name: str, block: str, prefix: int, grid: tuple[int, int]) -> None:
    assert layouts(name, block) == (Layout("NLC", prefix, grid),) * 2


def test_a_grid_that_is_not_square_keeps_its_sides() -> None:
    assert layouts("vit_tiny_patch16_224", "blocks.0", img_size=(48, 96))[0] == Layout("NLC", 1, (3, 6))
    with torch.device("meta"):
        model, image = timm.create_model("pvt_v2_b0"), torch.zeros(1, 3, 64, 128)
    found = tg.anatomy(model, example=((image,), {}))
    assert found.layout(Point("stages.2.blocks.0", "input")) == Layout("NLC", 0, (4, 8))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0"),
        ("swinv2_tiny_window16_256", "layers.2.blocks.0"),
        ("samvit_base_patch16_224", "blocks.0"),
        ("sam2_hiera_tiny", "blocks.3"),
        ("tiny_vit_5m_224", "stages.1.blocks.0"),
        ("volo_d1_224", "network.2.0"),
        ("gcvit_xxtiny", "stages.0.blocks.0"),
    ],
)
def test_maps_with_channels_last_are_seen_as_such(name: str, block: str) -> None:
    assert layouts(name, block) == (Layout("N...C"),) * 2


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("resnet18", "layer2.0"),
        ("convnext_atto", "stages.3.blocks.0"),
        ("maxvit_nano_rw_256", "stages.0.blocks.0"),
        ("davit_tiny", "stages.0.blocks.0.0"),
        ("focalnet_tiny_srf", "layers.0.blocks.0"),
        ("poolformerv2_s12", "stages.0.blocks.0"),
        ("efficientvit_m0", "stages.0.blocks.0"),
    ],
)
def test_maps_with_channels_second_are_seen_as_such(name: str, block: str) -> None:
    assert layouts(name, block) == (Layout(),) * 2


def test_a_block_that_is_as_wide_as_its_map_is_high_is_told_apart() -> None:
    class NormFirst(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.act = norm, nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.norm(x))

    for norm, wanted in ((nn.LayerNorm(8), Layout("N...C")), (nn.BatchNorm2d(8), Layout())):
        found = tg.anatomy(NormFirst(norm), example=((torch.zeros(1, 8, 8, 8),), {}))
        assert found.layout(Point("act", "input")) == wanted


def test_a_layer_says_itself_how_its_tensor_lies() -> None:
    found = tg.anatomy(timm.create_model("test_convnext"))
    assert found.layout(Point("stages.1.blocks.0.conv_dw", "output")) == Layout()
    assert found.layout(Point("stages.1.blocks.0.mlp.fc1", "input")) == Layout("N...C")
    assert found.layout(Point("stages.1.downsample.0", "output")) == Layout()


def test_a_sequence_of_vectors_in_a_network_of_conv1d_has_its_channels_last() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(3, 8, 3), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x).transpose(1, 2))

    found = tg.anatomy(Net())
    assert found.layout(Point("linear", "output")) == Layout("N...C")
    assert found.layout(Point("conv", "input")) == Layout()


@pytest.mark.parametrize(
    ("name", "block"), [("hiera_tiny_224", "blocks.0"), ("nest_tiny", "levels.0.transformer_encoder.0")]
)
def test_tokens_in_the_order_of_windows_are_no_map(name: str, block: str) -> None:
    with pytest.raises(tg.GraftError, match="window by window"):
        layouts(name, block)


def test_a_point_that_the_dry_run_did_not_see_is_named() -> None:
    found = tg.anatomy(timm.create_model("test_resnet"), example=((torch.zeros(1, 3, 32, 32),), {}))
    with pytest.raises(tg.GraftError, match=r"output of nowhere was not seen"):
        found.shape(Point("nowhere", "output"))
