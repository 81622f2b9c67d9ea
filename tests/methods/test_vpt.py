"""VPT: where prompts stand, what they change and what they leave alone, on sequences and on windows."""

from __future__ import annotations

import copy
import math

import pytest
import timm.models as tm
import torch
import torchvision.models as tv
import transformers as hf
from timm.models.swin_transformer import SwinTransformer, window_partition
from torch import Tensor, nn

import torchgraft as tg

from .networks import count, images

P = 3


def _vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    return _moved(tm.VisionTransformer(**{**small, **options})).eval()  # type: ignore[arg-type]


def _swin(**options: object) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    return _moved(SwinTransformer(**{**small, "num_classes": 5, **options})).eval()  # type: ignore[arg-type]


def _moved(model: nn.Module) -> nn.Module:
    """Weights under which every token counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def _close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _prompts(adapter: tg.Adapter) -> dict[str, Tensor]:
    """The adapter's prompts by the end of their names, made large enough to be seen."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return {name.rpartition("prompts.")[2]: t for name, t in adapter.state_dict().items()}


# -- counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "tokens", "shallow", "deep"),
    [
        ("vit_base_patch16_224", 5, 3_840, 46_080),
        ("vit_base_patch16_224", 10, 7_680, 92_160),
        ("vit_base_patch16_224", 50, 38_400, 460_800),
        ("vit_base_patch16_224", 100, 76_800, 921_600),
        ("swin_base_patch4_window7_224", 50, 6_400, 601_600),
        ("swin_tiny_patch4_window7_224", 5, 480, 22_080),
    ],
)
def test_prompts_have_the_published_number_of_values(backbone: str, tokens: int, shallow: int, deep: int) -> None:
    assert count(backbone, tg.methods.VPTShallow(num_tokens=tokens)) == shallow
    assert count(backbone, tg.methods.VPTDeep(num_tokens=tokens)) == deep


def test_a_projection_is_shared_by_all_layers() -> None:
    assert count("vit_base_patch16_224", "vpt-shallow[num_tokens=5, project=32]") == 5 * 32 + 32 * 768 + 768
    assert count("vit_base_patch16_224", "vpt-deep[num_tokens=5, project=32]") == 12 * 5 * 32 + 32 * 768 + 768


def test_options_of_depth_count_the_layers_they_choose() -> None:
    for option, layers in (("num_layers=4", 4), ("num_layers=4, reverse=true", 4), ("shared=true", 1)):
        assert count("vit_base_patch16_224", f"vpt-deep[num_tokens=5, {option}]") == layers * 5 * 768, option
    for start in ("pixel", "pixel-gaussian", "pixel-imagenet"):
        assert count("vit_base_patch16_224", f"vpt-shallow[num_tokens=5, start={start}]") == 3 * 16 * 16 * 5


# -- one sequence of tokens ------------------------------------------------------------------------------


def _by_hand(model: nn.Module, x: Tensor, prompts: list[Tensor | None], *, until: int, expand: bool = True) -> Tensor:
    """The published forward on a timm ViT: ``prompts[i]`` go in front of block i; the token sequence at the end."""
    with torch.no_grad():
        h = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        prefix, inside = model.num_prefix_tokens, False
        for i, block in enumerate(model.blocks):
            if prompts[i] is not None:
                behind = h[:, prefix + (P if inside else 0) :]
                h, inside = torch.cat([h[:, :prefix], prompts[i].expand(len(x), -1, -1), behind], 1), True
            elif inside and not expand and i == until:
                h, inside = torch.cat([h[:, :prefix], h[:, prefix + P :]], 1), False
            h = block(h)
        return model.norm(h)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ("", ["first", "0", "1"]),
        (", num_layers=1", ["first", None, None]),
        (", num_layers=2", ["first", "0", None]),
        (", num_layers=2, noexpand=true", ["first", "0", None]),
        (", num_layers=2, reverse=true", [None, "0", "1"]),
        (", shared=true", ["first", "first", "first"]),
    ],
)
def test_every_chosen_layer_gets_its_own_prompts_and_the_others_what_is_left(options: str, rows: list) -> None:
    model, x = _vit(), images(2, 16)
    held = _prompts(tg.attach(model, f"vpt-deep[num_tokens={P}{options}]"))
    chosen = [None if r is None else held["first"] if r == "first" else held["deep.0"][int(r)] for r in rows]
    found = _run(model, x)
    tg.activate(model, None)
    wanted = _by_hand(model, x, chosen, until=2, expand="noexpand" not in options)
    _close(found, model.head(wanted[:, 0]).detach())
    assert not torch.allclose(found, _run(model, x), atol=1e-3)


def test_shallow_prompts_stay_for_all_layers_and_are_projected() -> None:
    model, x = _vit(), images(2, 16)
    held = _prompts(tg.attach(model, f"vpt-shallow[num_tokens={P}, project=6]"))
    prompts = held["first"] @ held["project.weight"].T + held["project.bias"]
    found = _run(model, x)
    tg.activate(model, None)
    _close(found, model.head(_by_hand(model, x, [prompts, None, None], until=9)[:, 0]).detach())


@pytest.mark.parametrize("options", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {}])
def test_prompts_stand_behind_everything_that_is_no_patch(options: dict) -> None:
    model, x, seen = _vit(**options), images(2, 16), []
    held = _prompts(tg.attach(model, f"vpt-shallow[num_tokens={P}]"))
    handle = model.blocks[0].norm1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    _run(model, x)
    handle.remove()
    prefix = model.num_prefix_tokens
    assert seen[0].shape[1] == prefix + P + 16
    assert torch.equal(seen[0][:, prefix : prefix + P], held["first"].expand(2, -1, -1))


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
def test_what_reads_the_features_sees_no_prompt(method: str) -> None:
    model, x = _vit(global_pool="avg", fc_norm=True), images(2, 16)
    tg.attach(model, f"{method}[num_tokens={P}]")
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 17, 16)
        _close(model.forward_head(features, pre_logits=True), model.fc_norm(features[:, 1:].mean(1)))


@pytest.mark.parametrize(("pool", "kept"), [("all", slice(1, None)), ("prompts", slice(1, 1 + P))])
def test_what_a_model_averages_can_be_chosen(pool: str, kept: slice) -> None:
    model, x = _vit(global_pool="avg", fc_norm=True), images(2, 16)
    held = _prompts(tg.attach(model, f"vpt-shallow[num_tokens={P}, pool={pool}]"))
    found = _run(model, x)
    tg.activate(model, None)
    tokens = _by_hand(model, x, [held["first"], None, None], until=9)
    _close(found, model.head(model.fc_norm(tokens[:, kept].mean(1))).detach())


def test_the_published_reverse_overwrites_the_first_patches() -> None:
    model, x = _vit(), images(2, 16)
    held = _prompts(tg.attach(model, f"vpt-deep[num_tokens={P}, num_layers=2, reverse=true, official=true]"))
    found = _run(model, x)
    tg.activate(model, None)
    with torch.no_grad():
        h = model.blocks[0](model._pos_embed(model.patch_embed(x)))
        for i in (0, 1):
            h = model.blocks[i + 1](torch.cat([h[:, :1], held["deep.0"][i].expand(2, -1, -1), h[:, 1 + P :]], 1))
        _close(found, model.head(model.norm(h)[:, 0]))


@pytest.mark.parametrize(("pool", "kept"), [("patches", slice(1 + P, None)), ("prompts", slice(1, 1 + P))])
def test_the_published_noexpand_pools_by_position(pool: str, kept: slice) -> None:
    model, x = _vit(global_pool="avg", fc_norm=True), images(2, 16)
    spec = f"vpt-deep[num_tokens={P}, num_layers=2, noexpand=true, pool={pool}, official=true]"
    held = _prompts(tg.attach(model, spec))
    found = _run(model, x)
    tg.activate(model, None)
    tokens = _by_hand(model, x, [held["first"], held["deep.0"][0], None], until=2, expand=False)
    _close(found, model.head(model.fc_norm(tokens[:, kept].mean(1))).detach())


@pytest.mark.parametrize("start", ["pixel", "pixel-gaussian", "pixel-imagenet"])
def test_pixel_prompts_pass_the_frozen_patch_embedding(start: str) -> None:
    model, x = _vit(), images(2, 16)
    adapter = tg.attach(model, f"vpt-shallow[num_tokens={P}, start={start}]")
    (pixels,) = adapter.parameters()
    assert pixels.shape == (1, 3, 4, 4 * P)
    found = _run(model, x)
    tg.activate(model, None)
    raw = pixels.detach()
    if start == "pixel-imagenet":
        assert raw.min() >= 0
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        raw = (raw - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        prompts = model.patch_embed.proj(raw).flatten(2)[0].T
        _close(found, model.head(_by_hand(model, x, [prompts, None, None], until=9)[:, 0]))


def test_prompts_start_within_the_published_bound() -> None:
    bound = math.sqrt(6 / (3 * 4 * 4 + 16))
    for value in tg.attach(_vit(), "vpt-deep[num_tokens=50]").parameters():
        assert 0.95 * bound < value.abs().max() <= bound
    narrow = tg.attach(_vit(), "vpt-shallow[num_tokens=50, project=2]").state_dict()
    first = next(t for n, t in narrow.items() if n.endswith("first"))
    assert 0.95 * math.sqrt(6 / 50) < first.abs().max() <= math.sqrt(6 / 50)


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
@pytest.mark.parametrize("make", [_vit, _swin])
def test_dropout_acts_on_prompts_in_training_alone_and_in_each_image_apart(method: str, make) -> None:
    model = make()
    side = 32 if make is _swin else 16
    tg.attach(model, f"{method}[num_tokens=20, dropout=0.5]")
    x = images(1, side).repeat(2, 1, 1, 1)
    model.train()
    first, second = model(x).detach()
    assert not torch.allclose(first, second, atol=1e-4)
    model.eval()
    assert torch.equal(_run(model, x), _run(model, x))
    _close(*_run(model, x))


def test_the_backbone_stays_in_evaluation_while_prompts_train() -> None:
    model, x = _vit(proj_drop_rate=0.5, drop_path_rate=0.5), images(2, 16)
    tg.attach(model, f"vpt-deep[num_tokens={P}]")
    model.train()
    torch.testing.assert_close(model(x), model.eval()(x))


def test_rotary_positions_leave_prompts_alone() -> None:
    torch.manual_seed(0)
    model = tm.Eva(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5, use_rot_pos_emb=True)
    model, x = _moved(model).eval(), images(2, 16)
    held = _prompts(tg.attach(model, f"vpt-shallow[num_tokens={P}]"))
    found = _run(model, x)
    tg.activate(model, None)
    with torch.no_grad():
        h, rope = model._pos_embed(model.patch_embed(x))
        h = torch.cat([h[:, :1], held["first"].expand(2, -1, -1), h[:, 1:]], 1)
        for block in model.blocks:
            block.attn.num_prefix_tokens = 1 + P
            h = block(h, rope=rope)
        h = torch.cat([h[:, :1], h[:, 1 + P :]], 1)
        _close(found, model.forward_head(model.norm(h)))


@pytest.mark.parametrize("shared", [False, True])
def test_a_bias_per_pair_of_positions_is_zero_for_prompts(shared: bool) -> None:
    torch.manual_seed(0)
    options = {"use_shared_rel_pos_bias": True} if shared else {"use_rel_pos_bias": True}
    model = tm.Beit(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5, **options)
    model, x = _moved(model).eval(), images(2, 16)
    # Without a bias the model is a plain one, which takes longer sequences by itself.
    plain = copy.deepcopy(model)
    for name, value in plain.named_parameters():
        if "relative_position_bias_table" in name:
            value.data.zero_()
    found = []
    for one in (model, plain):
        adapter = tg.attach(one, f"vpt-deep[num_tokens={P}]")
        torch.manual_seed(1)
        held = _prompts(adapter)
        found.append(_run(one, x))
        tg.activate(one, None)
    assert not torch.allclose(*found, atol=1e-3)
    with torch.no_grad():
        cls = plain.cls_token.expand(2, -1, -1)
        h = torch.cat([cls, plain.patch_embed(x)], 1)
        h = h if plain.pos_embed is None else h + plain.pos_embed
        for block in plain.blocks:
            block.attn.relative_position_bias_table = None
        for prompts, block in zip([held["first"], held["deep.0"][0]], plain.blocks, strict=True):
            h = block(torch.cat([h[:, :1], prompts.expand(2, -1, -1), h[:, 1:]], 1))
            h = torch.cat([h[:, :1], h[:, 1 + P :]], 1)
        _close(found[1], plain.forward_head(plain.norm(h)))


# -- windows ---------------------------------------------------------------------------------------------


def _swin_by_hand(model: nn.Module, image: Tensor, prompts: list[Tensor | None]) -> Tensor:
    """The published forward of one image: prompts in front of the list of tokens, fresh ones where they are given."""
    x = model.patch_embed(image)
    blocks = [(stage, block) for stage in model.layers for block in stage.blocks]
    p: Tensor | None = None
    for i, (stage, block) in enumerate(blocks):
        if block is stage.blocks[0] and not isinstance(stage.downsample, nn.Identity):
            x = stage.downsample(x)
            if p is not None:
                p = stage.downsample.reduction(stage.downsample.norm(torch.cat([p] * 4, -1)))
        if prompts[i] is not None:
            p = prompts[i].unsqueeze(0)
        x, p = _block_by_hand(block, x, p)
    x, p = model.norm(x), model.norm(p)
    return model.head.fc(torch.cat([p, x.flatten(1, 2)], 1).mean(1))


def _block_by_hand(block: nn.Module, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    _, height, width, channels = x.shape
    attn, n = block.attn, p.shape[1]
    turned = torch.roll(block.norm1(x), [-s for s in block.shift_size], (1, 2))
    windows = window_partition(turned, block.window_size).flatten(1, 2)
    rows = torch.cat([block.norm1(p).expand(len(windows), -1, -1), windows], 1)
    q, k, v = attn.qkv(rows).reshape(*rows.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * attn.scale
    scores[:, :, n:, n:] += attn._get_rel_pos_bias()
    if block.attn_mask is not None:
        scores[:, :, n:, n:] += block.attn_mask.unsqueeze(1)
    y = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    a, b = block.window_size
    back = y[:, n:].reshape(1, height // a, width // b, a, b, channels).transpose(2, 3).reshape(x.shape)
    x = x + torch.roll(back, block.shift_size, (1, 2))
    p = p + y[:, :n].mean(0, keepdim=True)
    return x + block.mlp(block.norm2(x)), p + block.mlp(block.norm2(p))


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("vpt-shallow[num_tokens=3]", ["first", None, None, None]),
        ("vpt-shallow[num_tokens=20]", ["first", None, None, None]),
        ("vpt-deep[num_tokens=3]", ["first", "0.0", "1.0", "1.1"]),
        ("vpt-deep[num_tokens=3, num_layers=2]", ["first", "0.0", None, None]),
    ],
)
def test_prompts_pass_windows_and_mergings_as_published(spec: str, rows: list) -> None:
    model, x = _swin(), images(3, 32)
    held = _prompts(tg.attach(model, spec))
    found = _run(model, x)
    tg.activate(model, None)
    fresh: list[Tensor | None] = []
    for row in rows:
        stage, _, number = (row or "").partition(".")
        fresh.append(None if row is None else held["first"] if row == "first" else held[f"deep.{stage}"][int(number)])
    with torch.no_grad():
        # One image at a time: in the published code prompts leak between the images of a batch.
        _close(found, torch.cat([_swin_by_hand(model, image[None], fresh) for image in x]))


def _torchvision(timm: nn.Module) -> nn.Module:
    """torchvision's Swin with the weights of timm's."""
    model = tv.SwinTransformer([2, 2], 8, [2, 2], [1, 2], [4, 4], num_classes=5)
    state = {}
    for key, value in timm.state_dict().items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            key = ".".join(["features", str(2 * int(parts[1])), *parts[3:]])
        elif parts[0] == "layers":
            rest = ".".join(parts[4:]).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
            key = f"features.{2 * int(parts[1]) + 1}.{parts[3]}.{rest}"
        key = key.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
        state[key.replace("head.fc", "head")] = value
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert all("index" in key for key in missing)
    return model.eval()


def _transformers(timm: nn.Module) -> nn.Module:
    """The Swin of transformers with the weights of timm's."""
    config = hf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4, num_labels=5,
        drop_path_rate=0.0, layer_norm_eps=1e-5, hidden_act="gelu",
    )  # fmt: skip
    model = hf.SwinForImageClassification(config)
    state = {}
    for key, value in timm.state_dict().items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        key = ".".join(parts)
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                new = key.replace("attn.qkv", f"attention.{name}_proj")
                state[f"swin.encoder.{new}"] = part
            continue
        for old, new in (
            ("attn.proj", "attention.o_proj"),
            ("attn.relative", "attention.relative_position_bias.relative"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("patch_embed.norm", "embeddings.norm"),
        ):
            key = key.replace(old, new)
        key = f"encoder.{key}" if key.startswith("layers.") else key
        key = f"layernorm.{parts[1]}" if parts[0] == "norm" else key
        state[f"classifier.{parts[2]}" if parts[0] == "head" else f"swin.{key}"] = value
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert all("index" in key for key in missing)
    return model.eval()


@pytest.mark.parametrize("spec", ["vpt-shallow[num_tokens=5]", "vpt-deep[num_tokens=5]"])
@pytest.mark.parametrize("twin", [_torchvision, _transformers])
def test_the_swins_of_all_libraries_do_the_same(spec: str, twin) -> None:
    first, x = _swin(), images(3, 32)
    second = twin(first)
    _close(_run(second, x), _run(first, x))
    held = _prompts(tg.attach(first, spec)).values()
    with torch.no_grad():
        for parameter, value in zip(tg.attach(second, spec).parameters(), held, strict=True):
            parameter.copy_(value)
    _close(_run(second, x), _run(first, x))


@pytest.mark.parametrize("spec", ["vpt-shallow[num_tokens=3]", "vpt-deep[num_tokens=3]"])
def test_images_of_a_batch_do_not_see_each_other(spec: str) -> None:
    model, x = _swin(), images(3, 32)
    _prompts(tg.attach(model, spec))
    _close(_run(model, x), torch.cat([_run(model, image[None]) for image in x]))


@pytest.mark.parametrize("pool", ["patches", "prompts"])
def test_a_swin_averages_what_it_is_told_to(pool: str) -> None:
    model, x = _swin(), images(2, 32)
    adapter = tg.attach(model, f"vpt-deep[num_tokens={P}, pool={pool}]")
    _prompts(adapter)
    features = model.forward_features(x)
    assert features.shape == (2, 8, 8, 16)
    mean = model.head.fc(features.mean((1, 2)))
    assert torch.allclose(_run(model, x), mean, atol=1e-5) == (pool == "patches")


def test_feature_maps_of_a_swin_hold_no_prompt() -> None:
    model, x = _swin(), images(2, 32)
    plain = model.forward_intermediates(x, intermediates_only=True)
    tg.attach(model, f"vpt-shallow[num_tokens={P}]")
    found = model.forward_intermediates(x, intermediates_only=True)
    assert [f.shape for f in found] == [f.shape for f in plain]
    assert all(not torch.allclose(f, g, atol=1e-3) for f, g in zip(found, plain, strict=True))


# -- tools that look inside ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["vpt-shallow[num_tokens=3]", "vpt-deep[num_tokens=3, dropout=0.1]"])
@pytest.mark.parametrize("make", [_vit, _swin])
def test_a_prompted_model_compiles_as_one_graph_and_is_exported(spec: str, make) -> None:
    model, x = make(), images(2, 32 if make is _swin else 16)
    adapter = tg.attach(model, spec)
    wanted = model(x)
    wanted.square().sum().backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        _close(torch.export.export(model, (x,)).module()(x), wanted)


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vpt-shallow[num_tokens=0]", r"vpt-shallow: num_tokens=0 is not valid; expected at least 1"),
        ("vpt-deep[project=0]", r"vpt-deep: project=0.*a width of at least 1"),
        ("vpt-deep[dropout=1.0]", r"vpt-deep: dropout=1.0.*a rate from 0 to below 1"),
        ("vpt-deep[num_layers=0]", r"vpt-deep: num_layers=0.*at least 1 block"),
        ("vpt-deep[num_layers=4]", r"vpt-deep: num_layers=4, and 3 blocks are selected; give at most 3"),
        ("vpt-shallow[start=pixel, project=4]", r"vpt-shallow: start=pixel has no projection and no dropout"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, message: str) -> None:
    with pytest.raises(tg.GraftError, match=message):
        tg.attach(_vit(), spec)


def test_options_of_one_width_are_refused_on_windows() -> None:
    for option in ("project=4", "shared=true"):
        with pytest.raises(tg.GraftError, match=rf"vpt-deep: {option.title()[:3].lower()}.* is not defined on Swin"):
            tg.attach(_swin(), f"vpt-deep[{option}]")


def test_windows_of_another_kind_are_refused() -> None:
    model = tm.swin_transformer_v2.SwinTransformerV2(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=3
    )
    with pytest.raises(
        tg.GraftError, match=r"vpt-deep: the windows of SwinTransformerV2 .* are not those of Swin \(V1\)"
    ):
        tg.attach(model, "vpt-deep")


def test_a_bias_of_unknown_form_is_refused_by_name() -> None:
    model = tm.vision_transformer_relpos.VisionTransformerRelPos(
        img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    with pytest.raises(tg.GraftError, match=r"vpt-shallow: RelPosAttention in RelPosBlock adds a bias for each pair"):
        tg.attach(model, "vpt-shallow")


def test_a_block_that_needs_the_grid_of_its_tokens_is_refused() -> None:
    model = tm.Xcit(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    with pytest.raises(tg.GraftError, match=r"vpt-shallow: Xcit does not run with more tokens than 4"):
        tg.attach(model, "vpt-shallow")


def test_blocks_are_chosen_by_a_selection_that_has_no_gap() -> None:
    model = _vit()
    adapter = tg.attach(model, f"vpt-deep[num_tokens={P}]", include="blocks[1:]")
    assert adapter.num_parameters() == 2 * P * 16
    tg.detach(model)
    with pytest.raises(tg.GraftError, match=r"vpt-shallow: the selected blocks do not follow one another"):
        tg.attach(model, "vpt-shallow", exclude="blocks.1")
