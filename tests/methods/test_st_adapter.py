"""ST-Adapter: bottlenecks on the residual stream that look across the frames of a clip."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import get_act_layer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.frames import VideoWrapper
from torchgraft.errors import GraftError
from torchgraft.methods.st_adapter import FrameBottleneck, FrameConv, STAdapter

from .networks import anatomy, count, images, tiny

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "st-adapter.md"
CASE = Path(__file__).parents[1] / "golden" / "cases" / "st_adapter_vit.safetensors"

PUBLISHED = {
    ("vit_base_patch16_clip_quickgelu_224", "st-adapter"): 7_110_144,
    ("vit_base_patch16_clip_quickgelu_224", "st-adapter[pre_attn=true]"): 14_220_288,
    ("vit_base_patch16_clip_quickgelu_224", "st-adapter[kernel=[3, 3, 3]]"): 7_220_736,
    ("vit_base_patch16_clip_quickgelu_224", "st-adapter[width=128]"): 2_376_192,
    ("vit_large_patch14_clip_quickgelu_224", "st-adapter"): 18_945_024,
    ("vit_large_patch14_clip_quickgelu_224", "st-adapter[pre_attn=true]"): 37_890_048,
}


def documented(heading: str) -> list[list[str]]:
    """The cells of the page's table with this heading."""
    lines = PAGE.read_text(encoding="utf-8").partition(heading)[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def vit(img_size: tuple[int, int] = (32, 48), **options: Any) -> nn.Module:
    """A ViT with layer scale, two prefix tokens and an oblong grid."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=img_size, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=3, reg_tokens=1,
        init_values=0.5, **options,
    ).eval()  # fmt: skip


def attach(model: nn.Module, spec: str, seed: int = 0, **options: Any) -> tg.Adapter:
    """The method, moved away from its start."""
    adapter = tg.attach(model, spec, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if not name.startswith("head"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


def frames(count: int, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("name", "spec"), PUBLISHED)
def test_the_counts_are_the_published_ones(name: str, spec: str) -> None:
    assert count(name, spec) == PUBLISHED[name, spec]


@pytest.mark.parametrize("row", documented("| model | options |"), ids=" ".join)
def test_the_documented_counts_are_counted(row: list[str]) -> None:
    name, options, number = row
    assert count(name, f"st-adapter[{options}]") == int(number.replace(",", ""))


def test_one_bottleneck_has_the_size_of_the_formula() -> None:
    form = FrameBottleneck(768, 384, (3, 1, 1))
    assert sum(p.numel() for p in form.parameters()) == 2 * 768 * 384 + 384 * 3 + 2 * 384 + 768 == 592_512


def test_the_convolution_is_pytorchs_depthwise_one() -> None:
    torch.manual_seed(0)
    ours, theirs = FrameConv(6, (3, 1, 5)), nn.Conv3d(6, 6, (3, 1, 5), padding=(1, 0, 2), groups=6)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.squeeze(1))
        ours.bias.copy_(theirs.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 4, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("sites", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3)])
def test_a_vit_computes_what_its_equations_say(sites: tuple[bool, bool], kernel: tuple[int, int, int]) -> None:
    model, x = vit(), frames(8)
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    plain = [dict(b.named_children()) for b in model.blocks]
    adapter = attach(model, str(STAdapter(width=6, kernel=kernel, pre_attn=sites[0], pre_mlp=sites[1], frames=4)))
    forms = {(p.home, p.slot): p.form for _, p in adapter.placements}
    assert len(forms) == 3 * sum(sites)
    tg.activate(model, None)
    for i, block in enumerate(plain):
        for site, home, norm, branch, scale in (
            ("pre_attn", f"blocks.{i}", "norm1", "attn", "ls1"),
            ("pre_mlp", f"blocks.{i}.norm2", "norm2", "mlp", "ls2"),
        ):
            if (home, site) in forms:
                tokens = _by_hand(forms[home, site], tokens, kernel)
            tokens = tokens + block[scale](block[branch](block[norm](tokens)))
    wanted = model.forward_head(model.norm(tokens)).detach()
    tg.activate(model, "default")
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def _by_hand(form: Any, tokens: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """The published adapter on (2 clips * 4 frames, 2 prefix tokens + 4 * 6 patches, d)."""
    y = form.fc1(tokens[:, 2:])
    y = y.reshape(2, 4, 4, 6, -1).permute(0, 4, 1, 2, 3)
    y = torch.conv3d(y, form.conv.weight[:, None], form.conv.bias, padding=[k // 2 for k in kernel], groups=y.shape[1])
    y = form.fc2(y.permute(0, 2, 3, 4, 1).reshape(8, 24, -1))
    return torch.cat([tokens[:, :2], tokens[:, 2:] + y], dim=1)


@pytest.mark.parametrize("spec", ["st-adapter[width=6, pre_attn=true]", "st-adapter[width=6, kernel=[3, 3, 3]]"])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "swin", "test_vit"])
def test_the_start_is_the_pretrained_network_to_the_bit(backbone: str, spec: str) -> None:
    model, x = tiny(backbone), images(4)
    before = model(x)
    tg.attach(model, f"{spec[:-1]}, frames=2]")
    assert torch.equal(model(x), before)


def test_at_first_only_the_convolution_and_the_last_bias_learn() -> None:
    adapter = tg.attach(vit(), "st-adapter[width=6, pre_attn=true, pre_mlp=false, frames=4]")
    adapter.model(frames(4)).square().mean().backward()
    learning = {n.rpartition("pre_attn.")[2] for n, p in adapter.named_parameters() if p.grad.any()}  # type: ignore[union-attr]
    assert learning == {"conv.weight", "conv.bias", "fc2.bias"}


def test_a_clip_of_one_frame_sees_the_middle_taps_alone() -> None:
    model, x = vit(), frames(3)
    adapter = attach(model, "st-adapter[width=6]")
    one_by_one = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x), one_by_one)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("conv.weight"):
                parameter[:, [0, 2]] = 100.0
    torch.testing.assert_close(model(x), one_by_one)


@pytest.mark.parametrize(("taps", "sees_order"), [(3, True), (1, False)])
def test_the_order_of_the_frames_matters_with_taps_in_time_and_only_then(taps: int, sees_order: bool) -> None:
    model = vit()
    attach(model, f"st-adapter[width=6, kernel=[{taps}, 1, 1], pre_attn=true]")
    wrapper = VideoWrapper(model)
    video = frames(4).movedim(0, 1)[None]
    shuffled = video[:, :, [2, 0, 3, 1]]
    assert torch.allclose(wrapper(video), wrapper(shuffled), atol=1e-4) != sees_order


@pytest.mark.parametrize("spec", ["st-adapter[width=6, pre_attn=true]", "st-adapter[width=6, pre_mlp=true]"])
def test_the_stream_is_not_changed_in_place(spec: str) -> None:
    # The official adapter adds into the previous block's output, so that hooks which keep it see another value.
    model, x, kept = vit(), frames(4), []
    attach(model, f"{spec[:-1]}, frames=4]")
    handles = [b.register_forward_hook(lambda m, a, out: kept.append((out, out.clone()))) for b in model.blocks]
    handles.append(model.norm_pre.register_forward_hook(lambda m, a, out: kept.append((out, out.clone()))))
    model(x)
    for handle in handles:
        handle.remove()
    assert len(kept) == 4
    assert all(torch.equal(now, then) for now, then in kept)


def test_prefix_tokens_pass_by_and_patches_change() -> None:
    model, seen = vit(), []
    handle = model.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = frames(4)
    model(x)
    attach(model, "st-adapter[width=6, pre_attn=true, pre_mlp=false, frames=4]")
    model(x)
    handle.remove()
    assert torch.equal(seen[0][:, :2], seen[-1][:, :2])
    assert (seen[0][:, 2:] != seen[-1][:, 2:]).any(-1).all()


def test_only_the_last_blocks_are_adapted() -> None:
    adapter = tg.attach(vit(), "st-adapter[width=6, pre_attn=true, last=2]")
    assert [s.path for s in adapter.sites] == ["blocks.1", "blocks.1.norm2", "blocks.2", "blocks.2.norm2"]


@pytest.mark.parametrize(
    ("name", "homes"),
    [
        ("test_resnet", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("densenet121", [f"features.denseblock{i}" for i in range(1, 5)]),
        ("mixer_s32_224", [f"blocks.{i}" for i in range(8)]),
    ],
)
def test_blocks_without_attention_get_one_at_their_input_or_at_that_of_their_stage(name: str, homes: list[str]) -> None:
    with torch.device("meta"):
        placed = STAdapter(pre_attn=True).placements(anatomy(name))
    assert [(p.home, p.slot, p.carry) for p in placed] == [(home, "stream", None) for home in homes]  # type: ignore[attr-defined]


def test_attention_behind_a_convolution_gets_its_own_place_inside_the_block() -> None:
    with torch.device("meta"):
        placed = STAdapter(pre_attn=True, last=1).placements(anatomy("maxvit_tiny_tf_224"))
    block = "stages.3.blocks.1"
    parts = [(f"{block}.{part}.{norm}", slot) for part in ("attn_block", "attn_grid")
             for norm, slot in (("norm1", "pre_attn"), ("norm2", "pre_mlp"))]  # fmt: skip
    assert [(p.home, p.slot) for p in placed] == parts
    assert all(p.carry is not None for p in placed)  # type: ignore[attr-defined]


def test_attention_over_windows_is_adapted_on_the_whole_map_in_front_of_its_block() -> None:
    torch.manual_seed(0)
    model = SwinTransformerV2(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=3
    ).eval()  # fmt: skip
    adapter = attach(model, "st-adapter[width=6, pre_attn=true, pre_mlp=false, frames=2]")
    assert [s.path for s in adapter.sites] == ["layers.0.blocks.0", "layers.1.blocks.0"]
    x = images(4)
    assert not torch.allclose(model(x)[:2], model(x.flip(0)).flip(0)[:2], atol=1e-4)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "swin", "test_vit"])
def test_frames_of_a_clip_see_each_other_and_clips_do_not(backbone: str) -> None:
    model, x = tiny(backbone), images(6)
    attach(model, "st-adapter[width=6, pre_attn=true, frames=3]")
    out = model(x)
    touched = x.clone()
    touched[1] += 1.0
    moved = (model(touched) - out).abs().amax(1) > 1e-5
    assert moved.tolist() == [True, True, True, False, False, False]


def test_an_adapted_model_can_still_be_turned_to_channels_last() -> None:
    # A parameter with five axes would make this an error of PyTorch's.
    model, x = tiny("test_resnet"), images(4)
    attach(model, "st-adapter[width=6, kernel=[3, 3, 3], frames=2]")
    before = model(x)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), before, rtol=1e-4, atol=1e-5)


def test_costs_are_planned_for_a_still_image() -> None:
    plan = tg.plan(tiny("test_vit"), "st-adapter[width=6, frames=8]")
    assert plan.flops_added is not None and plan.flops_added > 0


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("st-adapter[width=0]", "width=0 is not valid; expected at least 1"),
        ("st-adapter[kernel=[2, 1, 1]]", r"kernel=\[2, 1, 1\] is not valid; expected three odd numbers"),
        ("st-adapter[kernel=[3, 1]]", "kernel"),
        ("st-adapter[pre_mlp=false]", "pre_attn and pre_mlp are both false"),
        ("st-adapter[frames=0]", "frames=0"),
    ],
)
def test_options_that_make_no_sense_are_one_line_errors(spec: str, text: str) -> None:
    with pytest.raises(GraftError, match=text) as error:
        tg.method(spec)
    assert "\n" not in str(error.value)


def test_more_last_blocks_than_there_are_is_an_error() -> None:
    with pytest.raises(GraftError, match=r"^st-adapter: last=4, but 3 blocks are selected"):
        tg.attach(vit(), "st-adapter[last=4]")


# -- the official checkpoint ------------------------------------------------------------------------------------


def clip_vit(depth: int = 2) -> nn.Module:
    """The host of the golden case."""
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=4, num_classes=0, pre_norm=True,
        act_layer=get_act_layer("quick_gelu"), norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).eval()  # fmt: skip


def official(*, adapters_only: bool = False) -> dict[str, Tensor]:
    state = {k.removeprefix("state/"): t for k, t in load_file(CASE).items() if k.startswith("state/")}
    return {k: t for k, t in state.items() if not adapters_only or "adapter" in k or k.startswith("fc.")}


def test_an_official_checkpoint_gives_the_official_logits() -> None:
    model, case = clip_vit(), load_file(CASE)
    adapter = tg.load_official(model, {"model": official()}, system="st_adapter", backbone="load")
    assert adapter.method == STAdapter(width=12, pre_attn=True)
    torch.testing.assert_close(VideoWrapper(model, average="norm")(case["input/video"]), case["output/logits"],
                               rtol=1e-4, atol=1e-6)  # fmt: skip
    trained = official(adapters_only=True)
    twin = clip_vit()
    twin.load_state_dict({k: t for k, t in model.state_dict().items() if "torchgraft" not in k})
    tg.load_official(twin, trained, system="st_adapter", frames=4)
    assert torch.equal(VideoWrapper(twin, average="norm")(case["input/video"]),
                       VideoWrapper(model, average="norm")(case["input/video"]))  # fmt: skip


def test_places_and_numbers_are_read_from_an_official_checkpoint() -> None:
    def method(state: dict[str, Tensor], depth: int = 2) -> tg.Method:
        return tg.official_systems()["st_adapter"](clip_vit(depth), frames=8).method(state)

    state = official(adapters_only=True)
    mlp = {k: t for k, t in state.items() if "pre_attn" not in k}
    assert method(mlp) == STAdapter(width=12, pre_mlp=True, frames=8)
    last = {k: t for k, t in state.items() if "resblocks.0" not in k and "pre_mlp" not in k}
    assert method(last) == STAdapter(width=12, pre_attn=True, pre_mlp=False, last=1, frames=8)
    with pytest.raises(GraftError, match=r"adapts the blocks \[0, 1\], which are not the last ones of this model's 3"):
        method(state, depth=3)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "holds no tensors"),
        ({"fc.weight": torch.zeros(5, 32)}, "holds no 'adapter_pre_attn' and no 'adapter_pre_mlp'"),
    ],
)
def test_a_state_without_adapters_is_refused(state: dict[str, Tensor], text: str) -> None:
    with pytest.raises(GraftError, match=text):
        tg.load_official(clip_vit(), state, system="st_adapter")


def test_a_host_that_is_no_clip_vit_is_refused() -> None:
    with pytest.raises(GraftError, match=r"^st_adapter: ResNet is no timm ViT"):
        tg.load_official(tiny("test_resnet"), official(adapters_only=True), system="st_adapter")


def test_an_unknown_key_is_refused() -> None:
    state = {**official(), "transformer.resblocks.0.adapter_pre_mlp.gate": torch.zeros(1)}
    with pytest.raises(GraftError, match=r"unknown key 'transformer.resblocks.0.adapter_pre_mlp.gate'"):
        tg.load_official(clip_vit(), state, system="st_adapter", backbone="load")
