"""HAT-Net: hierarchical attention on maps of any size, and the published checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import torchgraft as tg
from torchgraft.backbones.hatnet import PUBLISHED, HatNet, checkpoint_filter_fn, official_name
from torchgraft.backbones.hatnet_attention import Attention, HierarchicalAttention

from ..golden.files import CaseFiles, read_case
from .architectures import make

CASES = Path(__file__).parents[1] / "golden" / "cases"
OFFICIAL_COUNTS = {
    "hatnet_tiny": 12_655_912,
    "hatnet_small": 25_747_784,
    "hatnet_medium": 42_942_472,
    "hatnet_large": 63_132_488,
}
"""Parameters of the published code, with the norms that no output depends on."""


def spread(module: nn.Module) -> nn.Module:
    """Random weights under which every part shows, biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one head: (d, N), (d, M), (d, M) -> (d, N)."""
    return v @ (q.T @ k / q.shape[0] ** 0.5).softmax(-1).T


def slowly(attn: HierarchicalAttention, x: Tensor) -> Tensor:
    """The equations, one image, head and window at a time, without padding or masks."""
    channels, height, width = x.shape[1:]
    heads = [slice(i, i + attn.head_dim) for i in range(0, channels, attn.head_dim)]
    q, k, v = attn.qkv(attn.norm(x)).chunk(3, 1)
    local = torch.zeros_like(x)
    for image in range(len(x)):
        for head in heads:
            for top in range(0, height, attn.grid):
                for left in range(0, width, attn.grid):
                    at = image, head, slice(top, top + attn.grid), slice(left, left + attn.grid)
                    found = softmax_attention(*(t[at].flatten(1) for t in (q, k, v)))
                    local[at] = found.view(local[at].shape)
    a = attn.grid_norm(x + local)
    rows, columns = min(attn.ratio, height), min(attn.ratio, width)
    pooled = torch.stack(
        [
            a[:, :, i : i + rows, j : j + columns].mean((2, 3))
            for i in range(0, height - rows + 1, rows)
            for j in range(0, width - columns + 1, columns)
        ],
        -1,
    )
    key, value = attn.kv(attn.ds_norm(pooled[..., None])).chunk(2, 1)
    query, distant = attn.q(a), torch.zeros_like(x)
    for image in range(len(x)):
        for head in heads:
            found = softmax_attention(*(t[image, head].flatten(1) for t in (query, key, value)))
            distant[image, head] = found.view(-1, height, width)
    return attn.proj(distant + a)


def attention(
    grid: int = 4, ratio: int = 3, dim: int = 12, dtype: torch.dtype = torch.float32
) -> HierarchicalAttention:
    return spread(HierarchicalAttention(dim, 4, grid, ratio, dtype=dtype))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("height", "width"), [(8, 12), (8, 9), (5, 8), (7, 11), (3, 3), (1, 6), (1, 1)], ids=lambda n: str(n)
)
def test_hierarchical_attention_is_the_equation_on_maps_of_any_size(height: int, width: int) -> None:
    x = rand(2, 12, height, width)
    attn = attention()
    with torch.no_grad():
        wanted = slowly(attn, x)
        assert (attn(x) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        attn, x = attn.double(), x.double()
        torch.testing.assert_close(attn(x), slowly(attn, x), rtol=0, atol=1e-12)


def test_windows_that_leave_the_map_have_the_gradient_of_the_equation() -> None:
    attn = attention(dtype=torch.float64)
    x = rand(1, 12, 5, 7, dtype=torch.float64).requires_grad_()
    fast = torch.autograd.grad(attn(x).square().sum(), [x, *attn.parameters()])
    slow = torch.autograd.grad(slowly(attn, x).square().sum(), [x, *attn.parameters()])
    for found, wanted in zip(fast, slow, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_where_windows_fit_the_map_every_bit_is_that_of_attention_without_padding(monkeypatch) -> None:
    attn, x = attention(), rand(2, 12, 8, 12)
    with torch.no_grad():
        windows = attn.qkv(attn.norm(x)).view(2, 3, 3, 4, 2, 4, 3, 4).permute(1, 0, 4, 6, 2, 5, 7, 3)
        q, k, v = windows.reshape(3, 12, 3, 16, 4)
        local = F.scaled_dot_product_attention(q, k, v).view(2, 2, 3, 3, 4, 4, 4)
        a = attn.grid_norm(x + local.permute(0, 3, 6, 1, 4, 2, 5).reshape(x.shape))
        pooled = attn.kv(attn.ds_norm(F.avg_pool2d(a, 3))).flatten(2)
        query = attn.q(a).flatten(2).unflatten(1, (3, 4)).mT.contiguous()
        key, value = pooled.unflatten(1, (2, 3, 4)).mT.contiguous().unbind(1)
        distant = F.scaled_dot_product_attention(query, key, value).mT.reshape(x.shape)
        wanted = attn.proj(a + distant)
        monkeypatch.setattr(F, "pad", None)
        assert torch.equal(attn(x), wanted)


def test_without_windows_it_is_attention_over_the_whole_map() -> None:
    attn = spread(Attention(8, 4, dtype=torch.float64))
    x = rand(2, 8, 3, 5, dtype=torch.float64)
    q, k, v = attn.qkv(attn.norm(x)).chunk(3, 1)
    heads = torch.empty_like(x)
    for image in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            found = softmax_attention(*(t[image, head].flatten(1) for t in (q, k, v)))
            heads[image, head] = found.view(4, 3, 5)
    torch.testing.assert_close(attn(x), attn.proj(heads), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 31), (33, 200)])
def test_images_smaller_than_a_window_and_long_ones_work_alone_and_in_a_batch(height: int, width: int) -> None:
    model = make("test_hatnet")
    x = rand(2, 3, height, width)
    both = model(x)
    torch.testing.assert_close(both[1:], model(x[1:]), rtol=1e-4, atol=1e-5)
    assert both.isfinite().all()


def test_one_script_and_one_traced_graph_serve_images_of_every_size() -> None:
    model = make("test_hatnet")
    scripted = torch.jit.script(model)
    traced = create_feature_extractor(model, ["head"])
    with torch.jit.optimized_execution(False):  # type: ignore[no-untyped-call]
        for size in ((64, 64), (70, 33), (96, 48)):
            x = rand(1, 3, *size)
            torch.testing.assert_close(scripted(x), model(x))
            torch.testing.assert_close(traced(x)["head"], model(x))


def test_maps_stay_channels_last_from_the_image_to_the_head() -> None:
    model = make("test_hatnet").to(memory_format=torch.channels_last)
    last = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, a, out, name=name: (
                last.update({name: out.is_contiguous(memory_format=torch.channels_last)}) if out.dim() == 4 else None
            )
        )
    model(rand(2, 3, 72, 56).contiguous(memory_format=torch.channels_last))
    assert len(last) > 100 and [name for name, held in last.items() if not held] == []


def test_the_published_sizes_train_faster_channels_last() -> None:
    with torch.device("meta"):
        assert tg.prefers_channels_last(timm.create_model("hatnet_tiny"))


@pytest.mark.parametrize(
    "name",
    [
        "hatnet_tiny",
        "hatnet_small",
        *(pytest.param(f"hatnet_{n}", marks=pytest.mark.slow) for n in ("medium", "large")),
    ],
)
def test_a_size_has_the_published_operations_and_with_the_dead_norms_the_published_parameters(name: str) -> None:
    operations = 0

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal operations
        operations += out.numel() * module.weight[0].numel()

    with torch.device("meta"):
        model = timm.create_model(name)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        model(torch.zeros(1, 3, 224, 224))
    assert operations / 1e9 == pytest.approx(PUBLISHED[name].gmacs, abs=6e-4)
    # The published attention owns one norm more, like its first, and never calls it.
    dead = sum(p.numel() for m in model.modules() if isinstance(m, Attention) for p in m.norm.parameters())
    assert sum(p.numel() for p in model.parameters()) + dead == OFFICIAL_COUNTS[name]


@pytest.fixture(scope="module")
def case() -> CaseFiles:
    return read_case(CASES, "hatnet_small")


def load(case: CaseFiles, state: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """A model of the case's sizes that timm loads from an official checkpoint."""
    config = {key: value for key, value in case.config.items() if key != "form"}
    overlay = {"state_dict": state or dict(case.tensors["state"]), "num_classes": config["num_classes"]}
    return timm.create_model(
        "test_hatnet", pretrained=True, pretrained_cfg_overlay=overlay, **{**config, **options}
    ).eval()


@pytest.mark.parametrize("form", ["plain", "wrapped", "prefixed"])
def test_timm_loads_an_official_checkpoint_however_it_was_saved(case: CaseFiles, form: str) -> None:
    state: dict[str, Any] = dict(case.tensors["state"])
    if form == "prefixed":
        state = {f"module.{key}": value for key, value in state.items()}
    elif form == "wrapped":
        state = {"model": state, "epoch": 300}
    found = load(case, state)(case.tensors["input"]["image"])
    torch.testing.assert_close(found, case.tensors["output"]["logits"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [0, 3])
def test_an_official_checkpoint_loads_without_its_head_and_for_other_classes(case: CaseFiles, classes: int) -> None:
    model = load(case, num_classes=classes)
    image, wanted = case.tensors["input"]["image"], case.tensors["output"]["pre_logits"]
    torch.testing.assert_close(model.forward_head(model.forward_features(image), True), wanted, rtol=2e-5, atol=1e-6)
    assert model(image).shape == (1, classes or 32)


def test_a_headless_official_checkpoint_loads_into_a_headless_model(case: CaseFiles) -> None:
    state = {key: value for key, value in case.tensors["state"].items() if not key.startswith("classifier")}
    model = load(case, state, num_classes=0)
    wanted = case.tensors["output"]["pre_logits"]
    torch.testing.assert_close(model(case.tensors["input"]["image"]), wanted, rtol=2e-5, atol=1e-6)


def test_an_official_checkpoint_loads_for_gray_images_and_as_maps_of_features(case: CaseFiles) -> None:
    image = case.tensors["input"]["image"]
    gray = load(case, in_chans=1)
    torch.testing.assert_close(gray(image[:, :1]), load(case)(image[:, :1].expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    maps = load(case, features_only=True)(image)
    for i, found in enumerate(maps):
        torch.testing.assert_close(found, case.tensors["output"][f"stage{i}"], rtol=2e-5, atol=1e-5)


def test_an_official_checkpoint_runs_on_a_size_that_the_published_code_refuses(case: CaseFiles) -> None:
    assert load(case)(rand(2, 3, 131, 75)).isfinite().all()


def test_the_converter_drops_the_dead_norms_alone_and_leaves_its_input_as_it_was(case: CaseFiles) -> None:
    state = dict(case.tensors["state"])
    before = list(state)
    config = {key: value for key, value in case.config.items() if key != "form"}
    model = HatNet(**config)
    converted = checkpoint_filter_fn(state, model)
    assert list(state) == before
    assert converted.keys() == model.state_dict().keys()
    dropped = [key for key in state if official_name(key) is None]
    assert dropped and all(".attn.proj_norm." in key for key in dropped)
    assert len(converted) + len(dropped) == len(state)
    again = checkpoint_filter_fn(converted, model)
    assert all(again[key] is value for key, value in converted.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head_dim": 5}, "head_dim=5 does not divide the 8 channels"),
        ({"kernel_sizes": (3, 3, 4, 3)}, "kernel_sizes holds 4"),
        ({"depths": (1, 1)}, "have 4, 4, 4, 2, 4"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(tg.GraftError, match=said) as refusal:
        timm.create_model("test_hatnet", **options)
    assert "\n" not in str(refusal.value)


def test_stochastic_depth_grows_linearly_over_all_blocks() -> None:
    model = timm.create_model("test_hatnet", drop_path_rate=0.4)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for part in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, part), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_dropped_channels_are_dropped_in_training_only() -> None:
    model = make("test_hatnet", proj_drop_rate=0.5)
    x = rand(1, 3, 64, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model.forward_features(x), model.forward_features(x))


def test_a_conv_adapter_stands_beside_every_depthwise_convolution_and_every_step_down() -> None:
    adapter = tg.attach(make("test_hatnet"), "conv-adapter")
    depthwise = [f"stages[{i}].blocks[{j}].conv.conv2.0" for i, n in enumerate((1, 1, 2, 1)) for j in range(n)]
    between = [f"stages[{i}].downsample.conv" for i in (1, 2, 3)]
    assert sorted(address for address, _ in adapter.placements) == sorted(f"{a}/parallel" for a in depthwise + between)


def test_lora_changes_rows_of_queries_and_values_in_both_attentions_and_no_key() -> None:
    model = make("test_hatnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = tg.attach(model, "lora[rank=2]")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    tg.merge(model)
    changed = {k: v - before[k] for k, v in model.state_dict().items() if k in before and not v.equal(before[k])}
    hierarchical = [f"stages.{i}.blocks.{j}.attn" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1))]
    wanted = {f"{a}.{layer}.weight" for a in hierarchical for layer in ("qkv", "q", "kv")}
    assert set(changed) == wanted | {"stages.3.blocks.0.attn.qkv.weight"}
    for key, change in changed.items():
        moved = [bool(part.any()) for part in change.chunk({"qkv": 3, "kv": 2}.get(key.split(".")[-2], 1))]
        assert moved == {"qkv": [True, False, True], "kv": [False, True], "q": [True]}[key.split(".")[-2]]


def test_what_the_branches_add_reaches_the_stream_unchanged() -> None:
    model = make("test_hatnet")
    anatomy = tg.anatomy(model)
    assert [b.kind for b in anatomy.branches()] == ["attn", "mlp"] * 5
    x = rand(1, 3, 64, 64)
    for branch in (b for b in anatomy.branches() if b.block == "stages.3.blocks.0" and b.kind == "mlp"):
        before = model.forward_features(x)
        handle = model.get_submodule(branch.adds.path).register_forward_hook(lambda m, a, out: out + 0.25)
        torch.testing.assert_close(model.forward_features(x), before + 0.25)
        handle.remove()


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep", "vpt-add"])
def test_prompts_among_tokens_are_refused_since_the_blocks_work_on_maps(method: str) -> None:
    with pytest.raises(tg.GraftError, match="on maps") as refusal:
        tg.attach(make("test_hatnet"), method)
    assert "\n" not in str(refusal.value)


def test_an_adapter_trains_on_images_of_one_size_and_serves_another() -> None:
    model = make("test_hatnet", num_classes=4)
    tg.attach(model, "conv-adapter", num_classes=4)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = rand(8, 3, 48, 40), torch.arange(8) % 4
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model(rand(1, 3, 81, 64)).isfinite().all()
