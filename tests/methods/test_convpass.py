"""Convpass: what a bypass computes on tokens and maps, where it is added, and checkpoints of the official code."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Layout
from torchgraft.methods import Convpass, ConvpassAttn
from torchgraft.methods.forms.conv_bypass import ConvBypass

from .documented import table
from .networks import count, images, tiny, train_step
from .watching import record, spread


def bypass(layout: Layout, width: int = 4, **options: object) -> ConvBypass:
    """A bypass over 6 channels that is not at its start, in evaluation mode."""
    return spread(ConvBypass(6, 6, width, layout, **options)).eval()  # type: ignore[arg-type]


def by_hand(form: ConvBypass, maps: Tensor) -> Tensor:
    """The bypass of (N, C, H, W) maps, written with 1 x 1 convolutions."""
    down, up = (layer.weight[:, :, None, None] for layer in (form.down, form.up))
    z = form.act(F.conv2d(maps, down, form.down.bias))
    z = form.act(F.conv2d(z, form.conv.weight, form.conv.bias, padding=form.conv.kernel_size[0] // 2))
    return form.scale * F.conv2d(z, up, form.up.bias)


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return spread(VisionTransformer(**{**small, **options})).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("row", table("convpass.md", "| model | convpass |"), ids=lambda row: row["model"])
def test_bypasses_have_the_documented_size(row: dict[str, str]) -> None:
    for method in ("convpass", "convpass-attn"):
        if row[method] != "-":
            assert f"{count(row['model'], method):,}" == row[method]


def test_bypasses_have_the_published_size() -> None:
    assert count("vit_base_patch16_224", "convpass") == 327_552
    assert count("vit_base_patch16_224", "convpass-attn") == 163_776
    assert count("vit_base_patch16_224", "convpass[sites=[mlp]]") == 163_776
    assert count("swin_base_patch4_window7_224", "convpass") == 437_504
    assert count("swin_base_patch4_window7_224", "convpass-attn") == 218_752


@pytest.mark.parametrize("start", ["delta", "xavier"])
@pytest.mark.parametrize("width", [3, 8])
def test_the_network_starts_as_the_pretrained_one_with_both_starts_of_the_convolution(start: str, width: int) -> None:
    model = vit()
    plain = model(images())
    adapter = tg.attach(model, Convpass(width=width, conv_init=start))  # type: ignore[arg-type]
    assert torch.equal(model(images()), plain)
    train_step(adapter)
    assert not torch.equal(model(images()), plain)


def test_the_delta_start_hands_every_pixel_on() -> None:
    form = ConvBypass(6, 6, 5, Layout())
    x = torch.randn(2, 5, 4, 7)
    torch.testing.assert_close(form.conv(x), x)


def test_a_bypass_works_on_the_real_grid_of_tokens() -> None:
    form = bypass(Layout("NLC", 0, (3, 5)))
    maps = torch.randn(2, 6, 3, 5)
    found = form(maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found, by_hand(form, maps).flatten(2).transpose(1, 2))


def test_a_bypass_gives_the_same_for_every_layout() -> None:
    maps = torch.randn(2, 6, 3, 5)
    first = bypass(Layout())
    last = bypass(Layout("N...C"))
    last.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(maps), by_hand(first, maps))
    torch.testing.assert_close(last(maps.movedim(1, -1)).movedim(-1, 1), first(maps))


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_class_and_register_tokens_are_images_of_one_pixel(prefix: int) -> None:
    form = bypass(Layout("NLC", prefix, (2, 3)))
    x = torch.randn(2, prefix + 6, 6)
    pixels = by_hand(form, x[:, :prefix].reshape(-1, 6, 1, 1)).reshape(2, prefix, 6)
    patches = by_hand(form, x[:, prefix:].transpose(1, 2).reshape(2, 6, 2, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(form(x), torch.cat([pixels, patches], dim=1))


def test_a_bypass_with_kernel_1_is_a_plain_adapter_with_one_more_layer() -> None:
    form = bypass(Layout("NLC", 1, (2, 3)), kernel=1)
    x = torch.randn(2, 7, 6)
    z = form.act(F.linear(form.act(form.down(x)), form.conv.weight[:, :, 0, 0], form.conv.bias))
    torch.testing.assert_close(form(x), form.up(z))


def test_stochastic_depth_takes_whole_samples_class_token_included() -> None:
    form = bypass(Layout("NLC", 1, (2, 3)), dropout=0.0, drop_path=0.5, scale=3.0)
    x = torch.randn(64, 7, 6)
    kept = form(x)
    out = form.train()(x)
    whole = out.flatten(1).any(dim=1)
    assert 8 < int(whole.sum()) < 56
    torch.testing.assert_close(out[whole], 2 * kept[whole])


def test_the_bypass_of_a_branch_has_its_own_stochastic_depth_which_grows_with_the_block() -> None:
    model = vit(depth=3, drop_path_rate=0.5)
    adapter = tg.attach(model, Convpass(drop_path=0.4), dropout=True)
    rates = {p.home: p.form.drop_path.drop_prob for _, p in adapter.placements}  # type: ignore[union-attr]
    assert [rates[f"blocks.{i}.drop_path2"] for i in range(3)] == [0.0, 0.2, 0.4]
    spread(adapter.placements[-1][1].form)
    seen = record(model, "blocks.2.drop_path2", "output")
    plain = record(model, "blocks.2.mlp", "output")
    torch.manual_seed(0)
    model.train()(images(64))
    branch = plain[-1].flatten(1)
    # Divided by the chance of being kept, a surviving branch is doubled; what is left is the bypass.
    left = [(seen[-1].flatten(1) - factor * branch).abs().amax(1) < 1e-4 for factor in (0.0, 2.0)]
    dropped = left[0] | left[1]
    assert 8 < int(dropped.sum()) < 56
    assert left[0].any() and left[1].any()


@pytest.mark.parametrize("inside", [False, True])
def test_a_bypass_is_added_outside_layer_scale_unless_asked_for(inside: bool) -> None:
    model = vit(init_values=0.1)
    assert isinstance(model.blocks[-1].ls2.gamma, Tensor)
    plain = record(model, "blocks.1", "output")
    read = record(model, "blocks.1.norm2", "output")
    model(images())
    method = Convpass(sites=("mlp",), scale=0.5, inside_layer_scale=inside)
    adapter = tg.attach(model, method, include="blocks.1")
    form = spread(adapter.placements[0][1].form)
    model(images())
    change = form(read[0]) * (model.blocks[-1].ls2.gamma if inside else 1)
    torch.testing.assert_close(plain[-1] - plain[0], change, rtol=1e-4, atol=1e-5)


def test_both_branches_of_a_swin_block_know_the_grid_of_a_wide_image() -> None:
    model = SwinTransformer(
        img_size=(16, 32), patch_size=2, embed_dim=8, depths=(1,), num_heads=(2,), window_size=4, num_classes=3
    ).eval()
    adapter = tg.attach(model, "convpass")
    grids = {p.slot: p.form.layout for _, p in adapter.placements}  # type: ignore[union-attr]
    assert grids == {"attn": Layout("N...C"), "mlp": Layout("NLC", 0, (8, 16))}
    train_step(adapter, batch=torch.randn(2, 3, 16, 32))


def test_a_vit_with_positions_for_any_size_takes_another_grid_than_that_of_the_dry_run() -> None:
    model = vit(dynamic_img_size=True)
    adapter = tg.attach(model, "convpass")
    for _, placement in adapter.placements:
        spread(placement.form)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_a_sequential_bypass_reads_what_the_branch_adds() -> None:
    model = vit()
    added = record(model, "blocks.0.drop_path1", "output")
    model(images())
    adapter = tg.attach(model, ConvpassAttn(insertion="sequential"), include="blocks.0")
    form = spread(adapter.placements[0][1].form)
    model(images())
    torch.testing.assert_close(added[-1], added[0] + form(added[0]))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_blocks_of_convnets_take_a_bypass_with_their_stride(name: str) -> None:
    model = tiny(name)
    adapter = tg.attach(model, "convpass")
    assert {p.slot for _, p in adapter.placements} == {"block"}
    assert max(p.form.conv.stride[0] for _, p in adapter.placements) == 2  # type: ignore[union-attr]
    assert model(torch.randn(1, 3, 45, 37)).shape == (1, 3)


def test_networks_without_a_grid_or_a_residual_sum_are_refused_with_the_reason() -> None:
    words = nn.Sequential(nn.Embedding(30, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(tg.GraftError, match="convpass: Sequential reads no image"):
        tg.attach(words, "convpass")
    dense = timm.models.densenet.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=3)
    with pytest.raises(tg.GraftError, match="convpass: no block of DenseNet that is selected has a residual sum"):
        tg.attach(dense, "convpass")
    with pytest.raises(tg.GraftError, match="convpass-attn: no block of ResNet that is selected has attention"):
        tg.attach(tiny("test_resnet"), "convpass-attn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kernel=2", "convpass: kernel=2 is not valid; expected an odd number"),
        ("width=0", "convpass: width=0 is not valid"),
        ("act=gleu", "convpass: act='gleu'; did you mean 'gelu'"),
        ("sites=[]", "convpass: sites=\\(\\) is not valid; expected a list of attn, mlp or both"),
    ],
)
def test_options_without_sense_are_refused(options: str, message: str) -> None:
    with pytest.raises(tg.GraftError, match=message):
        tg.method(f"convpass[{options}]")


def official(blocks: list[str], widths: list[int], kinds: tuple[str, ...] = ("attn", "mlp")) -> dict[str, Tensor]:
    """Bypasses as the official code names them."""
    state = {}
    for block, d in zip(blocks, widths, strict=True):
        for kind in kinds:
            path = f"{block}.adapter_{kind}.adapter"
            shapes = {"down.weight": (4, d), "conv.weight": (4, 4, 3, 3), "up.weight": (d, 4)}
            biases = {"down.bias": (4,), "conv.bias": (4,), "up.bias": (d,)}
            state |= {f"{path}_{name}": torch.randn(shape) for name, shape in (shapes | biases).items()}
    return state


def test_an_official_checkpoint_of_a_vit_loads_with_its_head() -> None:
    model = vit()
    state = official(["blocks.0", "blocks.1"], [16, 16], ("attn",))
    state |= {"head.weight": torch.randn(7, 16), "head.bias": torch.randn(7)}
    adapter = tg.load_official(model, state, system="convpass", scale=0.1)
    assert adapter.method == Convpass(width=4, scale=0.1, sites=("attn",))
    assert model(images()).shape == (2, 7)
    saved = adapter.state_dict()
    name = next(n for n in saved if n.endswith("conv.weight") and "blocks[1]" in n)
    assert torch.equal(saved[name], state["blocks.1.adapter_attn.adapter_conv.weight"])


def test_an_official_checkpoint_of_a_whole_swin_loads_although_timm_has_moved_its_patch_merging() -> None:
    model, other = tiny("swin", num_classes=0), tiny("swin", num_classes=0)
    blocks = [f"layers.{i}.blocks.{j}" for i, depth in enumerate((1, 3)) for j in range(depth)]
    with torch.no_grad():
        state = {k: t + 0.1 for k, t in other.state_dict().items() if t.is_floating_point()}
    merging = {k: state.pop(k) for k in list(state) if ".downsample." in k}
    state |= {k.replace("layers.1.downsample", "layers.0.downsample"): t for k, t in merging.items()}
    assert "layers.0.downsample.reduction.weight" in state
    state |= official(blocks, [8, 16, 16, 16])
    tg.load_official(model, state, system="convpass", scale=1, backbone="load")
    assert torch.equal(model.layers[1].downsample.reduction.weight, state["layers.0.downsample.reduction.weight"])


def test_an_official_checkpoint_needs_its_scale() -> None:
    with pytest.raises(tg.GraftError, match="convpass: the checkpoint does not hold its scale"):
        tg.load_official(vit(), official(["blocks.0", "blocks.1"], [16, 16]), system="convpass")
