"""Pro-tuning: prompt blocks between the stages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import torchgraft as tg
from torchgraft.errors import GraftError
from torchgraft.methods.pro_tuning import PromptBlock, ProTuning

from .networks import anatomy, count, images, tiny, train_step

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "pro-tuning.md"

COUNTS = {
    ("resnet50", "pre"): 2_298_872,
    ("resnetv2_50x1_bit", "pre"): 2_298_872,
    ("resnet50", "post"): 9_167_604,
    ("convnext_tiny", "pre"): 352_564,
    ("convnext_tiny", "post"): 1_316_254,
    ("swin_tiny_patch4_window7_224", "pre"): 1_316_254,
    ("swin_tiny_patch4_window7_224", "post"): 1_316_254,
    ("vit_base_patch16_224", "pre"): 3_926_212,
    ("vit_base_patch16_224", "post"): 3_926_212,
    ("efficientnet_lite0", "pre"): 111_157,
}
PLACES = {
    "resnet50": (["layer1.0", "layer2.0", "layer3.0", "layer4.0"], [64, 256, 512, 1024]),
    "regnety_040": (["s1.b1", "s2.b1", "s3.b1", "s4.b1"], [32, 128, 192, 512]),
    "convnext_tiny": (["stages.0.blocks.0", "stages.1", "stages.2", "stages.3"], [96, 96, 192, 384]),
    "swin_tiny_patch4_window7_224": ([f"layers.{s}.blocks.0" for s in range(4)], [96, 192, 384, 768]),
    "vit_base_patch16_224": (["blocks.0", "blocks.3", "blocks.6", "blocks.9"], [768] * 4),
    "efficientnet_lite0": ([f"blocks.{s}.0" for s in range(7)], [32, 16, 24, 40, 80, 112, 192]),
    "densenet121": ([f"features.denseblock{s}" for s in range(1, 5)], [64, 128, 256, 512]),
}


def vit(img_size: tuple[int, int] = (32, 48), depth: int = 5) -> nn.Module:
    """A ViT with two prefix tokens on a grid that is no square."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=img_size, patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=3, reg_tokens=1
    ).eval()  # fmt: skip


def opened(adapter: tg.Adapter) -> tg.Adapter:
    """With beta away from zero."""
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("beta"):
                parameter.fill_(0.7)
    return adapter


def test_one_block_has_the_size_of_the_formula() -> None:
    for channels in (64, 96, 256):
        block = PromptBlock(channels, ProTuning())
        assert sum(p.numel() for p in block.parameters()) == 1.625 * channels**2 + 30.0625 * channels + 1
    assert sum(p.numel() for p in PromptBlock(64, ProTuning()).parameters()) == 8_581


@pytest.mark.parametrize(("name", "position"), COUNTS)
def test_the_blocks_of_a_network_have_the_size_of_the_specification(name: str, position: str) -> None:
    assert count(name, f"pro-tuning[position={position}]") == COUNTS[name, position]


def test_the_page_documents_these_counts() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([\d,]+) \|$", text, re.MULTILINE)
    assert len(rows) >= 7
    assert {(name, position): int(number.replace(",", "")) for name, position, number in rows}.items() <= COUNTS.items()


@pytest.mark.parametrize("name", PLACES)
def test_a_block_stands_in_front_of_every_stage(name: str) -> None:
    with torch.device("meta"):
        placed = ProTuning().placements(anatomy(name))
    assert ([p.home for p in placed], [p.form.conv1.in_channels for p in placed]) == PLACES[name]  # type: ignore[union-attr]


def test_a_transformer_of_one_stage_is_cut_into_four_groups_or_as_many_as_it_has_blocks() -> None:
    def homes(depth: int, position: str) -> list[str]:
        return [p.home for p in ProTuning(position=position).placements(tg.anatomy(vit(depth=depth)))]  # type: ignore[arg-type]

    assert homes(5, "pre") == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert homes(5, "post") == ["blocks.0", "blocks.1", "blocks.2", "blocks.4"]
    assert homes(8, "post") == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
    assert homes(2, "pre") == ["blocks.0", "blocks.1"]


def test_only_the_selected_stages_get_a_block() -> None:
    adapter = tg.attach(tiny("test_resnet"), "pro-tuning", include="stages[2:]")
    assert [s.path for s in adapter.sites] == ["layer3.0", "layer4.0"]


@pytest.mark.parametrize("reduction", [2, 4])
def test_the_options_change_the_size_as_the_formula_says(reduction: int) -> None:
    c, w, h = 64, 64 // reduction, 64 // reduction // 8
    config = ProTuning(reduction=reduction, groups=2, kernel=3, se_ratio=8, fusion="add_channel")
    expected = (c * w // 2 + w) + (9 * w + w) + (w * w + w) + (2 * w * h + w + h) + (w * c // 2 + c) + c
    assert sum(p.numel() for p in PromptBlock(c, config).parameters()) == expected
    bare = ProTuning(reduction=reduction, groups=2, kernel=3, se_ratio=0, fusion="add")
    assert sum(p.numel() for p in PromptBlock(c, bare).parameters()) == expected - (2 * w * h + w + h) - c


def test_channels_that_four_groups_do_not_divide_take_fewer() -> None:
    assert PromptBlock(18, ProTuning()).conv1.groups == 2
    assert PromptBlock(18, ProTuning(reduction=2)).conv1.groups == 1
    assert PromptBlock(9, ProTuning())(torch.randn(1, 9, 4, 4)).shape == (1, 9, 4, 4)


def test_the_block_is_the_one_that_is_documented() -> None:
    torch.manual_seed(0)
    block, x = PromptBlock(16, ProTuning()), torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        block.beta.fill_(0.3)  # type: ignore[union-attr]
        v = block.conv3(block.conv2(block.conv1(x)))
        gate = torch.sigmoid(block.gate.fc2(torch.relu(block.gate.fc1(v.mean((2, 3), keepdim=True)))))
        torch.testing.assert_close(block(x), 0.3 * block.conv4(v * gate))
    assert block(x).std(dim=(2, 3)).min() > 0, "the prompt must not be the same everywhere, as the gate alone would be"


@pytest.mark.parametrize("fusion", ["add_scalar", "add_channel", "add"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_the_start_is_the_pretrained_network_to_the_bit(fusion: str, position: str) -> None:
    for model, x in ((tiny("test_resnet"), images()), (vit(), torch.randn(2, 3, 32, 48))):
        before = model(x)
        tg.attach(model, f"pro-tuning[fusion={fusion}, position={position}]")
        assert torch.equal(model(x), before)


def test_at_first_only_beta_learns_and_then_every_weight() -> None:
    def learning(adapter: tg.Adapter) -> set[str]:
        adapter.model.zero_grad()
        adapter.model(images(4)).square().mean().backward()
        return {n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}

    adapter = tg.attach(tiny("test_resnet"), "pro-tuning[se_ratio=2]")
    assert learning(adapter) == {n for n, _ in adapter.named_parameters() if n.endswith("beta")}
    assert learning(opened(adapter)) == {n for n, _ in adapter.named_parameters()}


def test_prefix_tokens_are_the_same_bits_and_patches_are_not() -> None:
    model, seen = vit(), []
    handle = model.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 3, 32, 48)
    model(x)
    opened(tg.attach(model, "pro-tuning"))
    model(x)
    handle.remove()
    before, after = seen[0], seen[-1]
    assert torch.equal(before[:, :2], after[:, :2])
    assert (before[:, 2:] != after[:, 2:]).any(-1).all()


def test_the_kernel_sees_the_real_grid_of_an_oblong_image() -> None:
    model = vit()  # 4 x 6 patches behind two prefix tokens
    (placement, *_) = ProTuning(kernel=3, se_ratio=0).placements(tg.anatomy(model))
    with torch.no_grad():
        placement.form.beta.fill_(1.0)  # type: ignore[union-attr]
    base = torch.zeros(1, 26, 16)
    touched = base.clone()
    touched[0, 2 + 1 * 6 + 2] = 1.0  # row 1, column 2
    change = placement.transform(touched) - placement.transform(base)  # type: ignore[attr-defined]
    moved = (change.abs() > 1e-6).any(-1)[0, 2:].reshape(4, 6).nonzero().tolist()
    assert moved == [[i, j] for i in range(3) for j in range(1, 4)]


def test_removal_restores_the_backbone() -> None:
    model = tiny("test_resnet")
    keys, before = list(model.state_dict()), model(images())
    adapter = tg.attach(model, "pro-tuning[norm=batch, act=relu]", num_classes=4)
    train_step(adapter)
    tg.detach(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("pro-tuning[reduction=0]", "reduction=0 is not valid; expected at least 1"),
        ("pro-tuning[kernel=4]", "expected an odd number"),
        ("pro-tuning[se_ratio=-1]", "se_ratio=-1"),
        ("pro-tuning[act=rellu]", "did you mean 'relu'"),
        ("pro-tuning[fusion=gate]", "expected one of 'add_scalar', 'add_channel', 'add'"),
    ],
)
def test_options_that_make_no_sense_are_one_line_errors(spec: str, text: str) -> None:
    with pytest.raises(GraftError, match=text) as error:
        tg.method(spec)
    assert "\n" not in str(error.value)


def test_a_network_without_stages_is_refused() -> None:
    with pytest.raises(GraftError, match=r"^pro-tuning: VGG has no stages"):
        ProTuning().placements(anatomy("vgg11"))
