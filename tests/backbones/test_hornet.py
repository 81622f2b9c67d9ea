"""HorNet against its equations written out, its converter on published key names, and its global filter's states."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.backbones import create_backbone
from torchgraft.backbones.hornet import (
    GnConv,
    HorNet,
    checkpoint_filter_fn,
    classes_of,
    official_name,
    select_classes,
)
from torchgraft.backbones.hornet_filter import GlobalLocalFilter, resized_filter
from torchgraft.backbones.hornet_neck import HorFPN
from torchgraft.errors import GraftError

from .architectures import make

GOLDEN = Path(__file__).parents[1] / "golden" / "cases"
X = torch.randn(1, 6, 9, 12, generator=torch.Generator().manual_seed(2))
"""A map of another size than the filters are stored for."""

both_forms = pytest.mark.parametrize("dft_matmul", [False, True])


def image(rows: int = 1, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def shaken(module: nn.Module) -> nn.Module:
    """Weights under which every part of the module shows."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
    return module.eval()


def global_filter(dim: int = 6, size: tuple[int, int] = (5, 4), **options) -> GlobalLocalFilter:
    return shaken(GlobalLocalFilter(dim, size, **options))


# -- gnConv ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_gnconv_of_every_order_is_its_equation_written_out(order, scale):
    mixer = shaken(GnConv(16, order, scale)).double()
    x = torch.randn(2, 16, 9, 11, dtype=torch.float64)
    widths = [16 // 2 ** (order - 1 - k) for k in range(order)]
    u = mixer.proj_in(x)
    p, q = u[:, : widths[0]], u[:, widths[0] :]
    kernel, bias = mixer.dwconv.weight, mixer.dwconv.bias
    padded = torch.zeros(2, q.shape[1], 15, 17, dtype=torch.float64)
    padded[:, :, 3:-3, 3:-3] = q
    slid = sum(
        kernel[None, :, 0, i, j, None, None] * padded[:, :, i : i + 9, j : j + 11] for i in range(7) for j in range(7)
    )
    g = scale * (slid + bias[None, :, None, None])
    z, start = p * g[:, : widths[0]], widths[0]
    for k in range(1, order):
        z = mixer.pws[k - 1](z) * g[:, start : start + widths[k]]
        start += widths[k]
    assert start == g.shape[1] == 32 - widths[0]
    torch.testing.assert_close(mixer(x), mixer.proj_out(z))


@pytest.mark.parametrize(
    ("dim", "order", "message"), [(12, 4, "use a multiple of 8"), (8, 0, "expected an order of at least 1")]
)
def test_gnconv_refuses_what_its_order_does_not_divide(dim, order, message):
    with pytest.raises(GraftError, match=message):
        GnConv(dim, order)


def test_a_block_is_two_scaled_residual_branches():
    block = make("test_hornet").stages[1].blocks[0]
    x = torch.randn(2, 16, 8, 8)
    y = x + block.gamma1[:, None, None] * block.gnconv(block.norm1(x))
    mlp = block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(y.permute(0, 2, 3, 1)))))
    torch.testing.assert_close(block(x), y + (block.gamma2 * mlp).permute(0, 3, 1, 2))


@pytest.mark.parametrize("start", [None, 0.0, -1.0])
def test_without_layer_scale_there_are_no_gammas(start):
    model = HorNet(depths=(1, 1, 1, 1), base_dim=8, num_classes=10, ls_init_value=start)
    assert not any("gamma" in name for name, _ in model.named_parameters())
    assert model.eval()(image()).isfinite().all()


def test_weights_start_as_published():
    model = timm.create_model("test_hornet_gf", base_dim=32, drop_path_rate=0.4)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > 2000:
            assert 0.018 < module.weight.std() < 0.022, name
            assert module.bias is None or not module.bias.any(), name
        if isinstance(module, GlobalLocalFilter):
            assert 0.017 < module.complex_weight.std() < 0.023
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert all(torch.equal(b.gamma1, torch.full_like(b.gamma1, 1e-6)) for b in blocks)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in blocks]
    assert rates == pytest.approx([0.4 * i / (len(blocks) - 1) for i in range(len(blocks))])


def test_the_scale_of_the_head_acts_on_the_classifier_alone():
    torch.manual_seed(0)
    plain = timm.create_model("test_hornet").state_dict()
    torch.manual_seed(0)
    scaled = timm.create_model("test_hornet", head_init_scale=0.5).state_dict()
    different = {key for key in plain if not torch.equal(plain[key], scaled[key])}
    assert different == {"head.fc.weight"}
    assert torch.equal(scaled["head.fc.weight"], 0.5 * plain["head.fc.weight"])


def test_every_stage_may_have_a_scale_and_a_filter_of_its_own():
    scales = (1.0, 0.5, 0.25, 2.0)
    model = timm.create_model("test_hornet", gn_scale=scales, gf_sizes=((3, 3), None, None, (2, 2)))
    assert tuple(stage.blocks[0].gnconv.scale for stage in model.stages) == scales
    filters = [isinstance(stage.blocks[0].gnconv.dwconv, GlobalLocalFilter) for stage in model.stages]
    assert filters == [True, False, False, True]
    with pytest.raises(GraftError, match="expected the same number"):
        timm.create_model("test_hornet", gn_scale=(1.0, 0.5))


def test_an_odd_width_has_no_global_filter():
    with pytest.raises(GraftError, match="even number of channels"):
        GlobalLocalFilter(7, (4, 3))


# -- the global filter ----------------------------------------------------------------------------------


def corners_in_place(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Bilinear resizing of (C, h, w, 2), point by point."""
    out = weight.new_zeros(weight.shape[0], rows, columns, 2)
    for i in range(rows):
        for j in range(columns):
            y = i * (weight.shape[1] - 1) / max(rows - 1, 1)
            x = j * (weight.shape[2] - 1) / max(columns - 1, 1)
            for row, far in ((int(y), y % 1), (int(y) + 1, 1 - y % 1)):
                for column, wide in ((int(x), x % 1), (int(x) + 1, 1 - x % 1)):
                    share = (1 - far) * (1 - wide)
                    if share > 0:
                        out[:, i, j] += share * weight[:, row, column]
    return out


def filtered_by_sums(module: GlobalLocalFilter, x: Tensor) -> Tensor:
    """What the layer computes, as sums over all positions in float64."""
    height, width = x.shape[-2:]
    columns = width // 2 + 1
    near, far = module.pre_norm(x).double().chunk(2, dim=1)
    kernel = torch.view_as_complex(corners_in_place(module.complex_weight.double(), height, columns))
    h, w, c = torch.arange(height), torch.arange(width), torch.arange(columns)
    down = torch.exp(-2j * math.pi * torch.outer(h, h).double() / height) / math.sqrt(height)
    across = torch.exp(-2j * math.pi * torch.outer(w, c).double() / width) / math.sqrt(width)
    spectrum = torch.einsum("kh,bchw,wl->bckl", down, far.to(down.dtype), across) * kernel
    rows = torch.einsum("hk,bckl->bchl", down.conj(), spectrum)
    times = torch.tensor([1.0 if 2 * k in (0, width) else 2.0 for k in range(columns)], dtype=torch.float64)
    back = (times * rows) @ across.conj().T
    convolved = nn.functional.conv2d(near, module.dw.weight.double(), padding=1, groups=near.shape[1])
    out = torch.empty_like(x, dtype=torch.float64)
    out[:, 0::2], out[:, 1::2] = convolved, back.real
    return module.post_norm.double()(out)


@both_forms
@pytest.mark.parametrize("size", [(5, 6), (5, 7), (8, 6), (4, 9), (1, 1), (2, 1), (1, 2), (13, 20)])
def test_the_global_filter_is_the_sum_over_all_positions(size, dft_matmul):
    module = global_filter(dft_matmul=dft_matmul)
    x = torch.randn(2, 6, *size)
    found = module(x)
    wanted = filtered_by_sums(copy.deepcopy(module), x)
    assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max()


@both_forms
def test_its_gradients_are_those_of_the_sum(dft_matmul):
    module = global_filter(size=(3, 3), dft_matmul=dft_matmul).double()
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, k: torch.func.functional_call(module, {"complex_weight": k}, x),
                                    (x, module.complex_weight))  # fmt: skip


def test_resizing_to_the_same_size_changes_nothing():
    weight = torch.randn(3, 5, 4, 2)
    assert torch.equal(resized_filter(weight, 5, 4), weight)


@both_forms
@pytest.mark.parametrize("size", [(5, 6), (9, 12)])
def test_the_transform_is_computed_in_float32_whatever_the_weights_are(size, dft_matmul):
    module = global_filter(dim=16, dft_matmul=dft_matmul)
    x = torch.randn(2, 16, *size)
    wanted = module(x)
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        found = copy.deepcopy(module).to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        # A few roundings of single values; a transform in half precision would add up many.
        assert (found.float() - wanted).abs().max() < 10 * step * wanted.abs().max()


@both_forms
def test_autocast_leaves_the_transform_in_float32(dft_matmul, monkeypatch):
    seen = []
    from torchgraft.backbones import hornet_filter

    name = "_by_matrices" if dft_matmul else "_by_fft"
    transform = getattr(hornet_filter, name)

    def recorded(x, weight):
        seen.append((x.dtype, weight.dtype, torch.is_autocast_enabled("cpu") and dft_matmul))
        return transform(x, weight)

    monkeypatch.setattr(hornet_filter, name, recorded)
    module = global_filter(dft_matmul=dft_matmul)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 6, 7, 7))
    assert seen == [(torch.float32, torch.float32, False)]


def test_both_forms_give_the_same_network():
    model = make("test_hornet_gf")
    other = make("test_hornet_gf", dft_matmul=True)
    other.load_state_dict(model.state_dict())
    for x in (image(2), image(1, 96, 80), image(1, 150, 97)):
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.jit.script(other)(image(1, 96)), model(image(1, 96)), rtol=1e-5, atol=1e-6)


def test_the_form_of_matrices_exports_without_complex_numbers():
    model = global_filter(dft_matmul=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(model, (X,)).graph
    tensors = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert tensors and not any(t.is_complex() for t in tensors)


# -- the kept filter ------------------------------------------------------------------------------------


def frozen_filter(**options) -> GlobalLocalFilter:
    return global_filter(**options).requires_grad_(False)


def fresh(module: GlobalLocalFilter, x: Tensor = X) -> Tensor:
    """What a copy computes that never kept anything."""
    copied = type(module)(6, tuple(module.complex_weight.shape[1:3])).to(x.dtype)
    copied.load_state_dict(module.state_dict())
    return copied(x)


def test_a_frozen_filter_is_resized_once_per_size():
    module = frozen_filter()
    module(X)
    kept = module._kept.result
    module(X)
    assert module._kept.result is kept
    module(torch.randn(1, 6, 10, 10))
    assert module._kept.result is not kept
    torch.testing.assert_close(module(X), fresh(module), rtol=0, atol=0)


def test_a_trainable_filter_is_not_kept():
    module = global_filter()
    module(X)
    assert module._kept is None


def test_no_change_of_the_filter_is_missed():
    other = shaken(GlobalLocalFilter(6, (5, 4))).state_dict()
    other["complex_weight"] = other["complex_weight"] + 1
    changes = {
        "load": lambda m: m.load_state_dict(other),
        "assign": lambda m: m.load_state_dict({k: v.clone() for k, v in other.items()}, assign=True),
        "in place": lambda m: m.complex_weight.add_(1),
        "state dict": lambda m: m.state_dict()["complex_weight"].mul_(2),
        "replaced": lambda m: setattr(m, "complex_weight", nn.Parameter(torch.randn(3, 5, 4, 2), requires_grad=False)),
        "data": lambda m: setattr(m.complex_weight, "data", torch.randn(3, 5, 4, 2)),
        "apply": lambda m: m._apply(lambda t: t + 1),
    }
    for name, change in changes.items():
        module = frozen_filter()
        before = module(X)
        with torch.no_grad():
            change(module)
        after = module(X)
        torch.testing.assert_close(after, fresh(module), rtol=0, atol=0, msg=name)
        assert not torch.equal(after, before), name


def test_a_filter_that_becomes_trainable_trains():
    module = frozen_filter()
    module(X)
    module.requires_grad_(True)
    module(X).square().mean().backward()
    assert module.complex_weight.grad.abs().max() > 0
    with torch.no_grad():
        module.complex_weight -= module.complex_weight.grad
    torch.testing.assert_close(module.requires_grad_(False)(X), fresh(module), rtol=0, atol=0)


def test_other_types_and_substituted_weights_do_not_meet_the_kept_one():
    module = frozen_filter()
    module(X)
    weight = torch.randn(3, 5, 4, 2)
    found = torch.func.functional_call(module, {"complex_weight": weight}, X)
    module.complex_weight.copy_(weight)
    torch.testing.assert_close(found, module(X), rtol=0, atol=0)
    module.double()
    torch.testing.assert_close(module(X.double()), fresh(module, X.double()), rtol=0, atol=0)
    assert module.float()(X).dtype == torch.float32


def test_a_filter_kept_in_inference_mode_serves_training_afterwards():
    module = frozen_filter()
    with torch.inference_mode():
        module(X)
    x = X.clone().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        made = frozen_filter()
        made(X)
    assert made._kept is None


def test_the_kept_filter_is_no_part_of_the_model():
    model = make("test_hornet_gf").requires_grad_(False)
    x = image(1, 96)
    names, wanted = list(model.state_dict()), model(x)
    layers = [m for m in model.modules() if isinstance(m, GlobalLocalFilter)]
    assert layers and all(layer._kept is not None for layer in layers)
    assert list(model.state_dict()) == names
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for copied in copies:
        assert all(m._kept is None for m in copied.modules() if isinstance(m, GlobalLocalFilter))
        assert torch.equal(copied(x), wanted)


@pytest.mark.parametrize("record", [torch.jit.script, lambda m: torch.jit.trace(m, X), torch.fx.symbolic_trace])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_recorded_models_read_the_parameter_not_the_kept_filter(record):
    module = frozen_filter()
    module(X)
    recorded = record(module)
    torch.testing.assert_close(recorded(X), module(X))
    changed = {k: v + 1 if k.endswith("complex_weight") else v for k, v in module.state_dict().items()}
    assert list(recorded.state_dict()) == list(changed)
    recorded.load_state_dict(changed)
    module.load_state_dict(changed)
    torch.testing.assert_close(recorded(X), module(X))


def test_compiled_models_see_changes_of_a_frozen_filter():
    module = frozen_filter()
    module(X)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), module(X))
    module.complex_weight.add_(1)
    torch.testing.assert_close(compiled(X), fresh(module))


# -- published checkpoints ------------------------------------------------------------------------------


def official(case: str = "hornet_7x7") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A published state dict, its image and logits (or first map)."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    output = "output/logits" if "output/logits" in tensors else "output/out0"
    return state, tensors["input/image"], tensors[output]


OPTIONS = {"mlp_ratio": 4, "depths": (1, 2, 2, 1)}


def loaded(checkpoint: dict, num_classes_of_file: int = 11, **options) -> HorNet:
    overlay = {"state_dict": checkpoint, "num_classes": num_classes_of_file}
    options = {"num_classes": 11, **OPTIONS, **options}
    return timm.create_model("test_hornet", pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def test_a_published_file_reproduces_its_logits_however_it_is_wrapped(tmp_path):
    state, x, logits = official()
    before = {k: v.clone() for k, v in state.items()}
    for checkpoint in (state, {"model": state}, {"model_ema": {f"module.{k}": v for k, v in state.items()}}):
        torch.testing.assert_close(loaded(checkpoint)(x), logits, rtol=2e-5, atol=1e-6)
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)
    torch.save({"model": state}, tmp_path / "file.pth")
    overlay = {"file": str(tmp_path / "file.pth"), "num_classes": 11}
    model = timm.create_model("test_hornet", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=11, **OPTIONS)
    torch.testing.assert_close(model.eval()(x), logits, rtol=2e-5, atol=1e-6)
    ours = create_backbone("test_hornet", weights=tmp_path / "file.pth", num_classes=11, **OPTIONS)
    torch.testing.assert_close(ours(x), logits, rtol=2e-5, atol=1e-6)


def test_a_published_file_loads_into_other_heads_channels_and_sizes():
    state, x, _ = official()
    whole = loaded(state)
    assert loaded(state, num_classes=3)(x).shape == (2, 3)
    torch.testing.assert_close(loaded(state, num_classes=0)(x), whole.forward_head(whole.forward_features(x), True))
    gray = loaded(state, in_chans=1, num_classes=11)
    torch.testing.assert_close(gray(x[:, :1]), whole(x[:, :1].expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-6)
    maps = loaded(state, features_only=True)(x)
    for found, wanted in zip(maps, whole.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_file_without_a_head_fits_a_model_without_one():
    state, x, _ = official()
    trunk = {k: v for k, v in state.items() if not k.startswith(("norm.", "head."))}
    maps = loaded(trunk, features_only=True)(x)
    wanted = loaded(state).forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(maps[-1], wanted[-1])


def test_the_output_norms_of_a_dense_file_go_where_there_is_a_place():
    state, x, out0 = official("hornet_dense_7x7")
    wrapped = {"state_dict": {f"backbone.{k}": v for k, v in state.items()}}
    options = {"num_classes": 0, "mlp_ratio": 4, "depths": (1, 1, 1, 1)}
    model = timm.create_model("test_hornet", **options).eval()
    model.prune_intermediate_layers([3])
    plain = checkpoint_filter_fn(wrapped, model)
    assert not any(k.startswith("norm") for k in plain)
    model.load_state_dict(plain)
    model.norm0 = timm.layers.LayerNorm2d(8)
    converted = checkpoint_filter_fn(wrapped, model)
    assert {k for k in converted if k.startswith("norm")} == {"norm0.weight", "norm0.bias"}
    model.load_state_dict(converted)
    first = model.forward_intermediates(x, [0], intermediates_only=True)[0]
    torch.testing.assert_close(model.norm0(first), out0, rtol=2e-5, atol=1e-6)
    assert official_name("norm3.bias") == "norm3.bias"


@pytest.mark.parametrize("published", [False, True])
def test_filters_are_resized_to_the_model_that_they_are_loaded_into(published):
    small = make("test_hornet_gf")
    sizes = (None, None, (9, 7), (5, 4))
    state = small.state_dict()
    if published:
        named = {official_name(k): k for k in official_keys(small)}
        state = {official: small.state_dict()[ours] for ours, official in named.items()}
    large = timm.create_model("test_hornet_gf", gf_sizes=sizes)
    large.load_state_dict(checkpoint_filter_fn(state, large))
    key = "stages.2.blocks.1.gnconv.dwconv.complex_weight"
    wanted = corners_in_place(small.state_dict()[key], 9, 7)
    torch.testing.assert_close(large.state_dict()[key], wanted)
    # On maps of the new stored size both models use the same filter.
    torch.testing.assert_close(large.stages[2].blocks[1](y := torch.randn(1, 32, 9, 12)), small.stages[2].blocks[1](y))


def official_keys(model: HorNet) -> list[str]:
    """The published names of a model of ours: the table of the converter, read backwards."""
    keys = []
    for key in model.state_dict():
        key = key.replace("stem.", "downsample_layers.0.").replace(".mlp.fc", ".pwconv").replace(".blocks.", ".")
        for i in (1, 2, 3):
            key = key.replace(f"stages.{i}.downsample.", f"downsample_layers.{i}.")
        keys.append(key.replace("head.norm.", "norm.").replace("head.fc.", "head."))
    return keys


def test_the_number_of_classes_comes_from_the_file():
    state, x, logits = official()
    many = {**state, "head.weight": torch.randn(10459, 64), "head.bias": torch.randn(10459)}
    assert classes_of({"model": many}) == 10459
    model = loaded(many, num_classes_of_file=10459, num_classes=10459)
    assert model(x).shape == (2, 10459)
    assert classes_of(model.state_dict()) == 10459
    assert classes_of({k: v for k, v in state.items() if not k.startswith("head")}) is None
    rows = [10458, *range(10)]
    many["head.weight"][rows], many["head.bias"][rows] = state["head.weight"], state["head.bias"]
    chosen = select_classes({"model": many}, rows)
    assert many["head.bias"].numel() == 10459
    torch.testing.assert_close(loaded(chosen)(x), logits, rtol=2e-5, atol=1e-6)
    with pytest.raises(GraftError, match="class 10459 is none of them"):
        select_classes(many, [0, 10459])
    with pytest.raises(GraftError, match="no classifier"):
        select_classes({"stem.0.weight": torch.zeros(1)}, [0])


# -- the neck -------------------------------------------------------------------------------------------


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    rows = [i * x.shape[2] // height for i in range(height)]
    columns = [j * x.shape[3] // width for j in range(width)]
    return x[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize("global_filter", [False, True])
def test_the_neck_is_its_equation_on_maps_of_any_size(global_filter):
    neck = shaken(HorFPN((8, 16, 32), out_channels=8, num_outs=5, global_filter=global_filter))
    maps = [torch.randn(2, c, h, w) for c, h, w in ((8, 13, 21), (16, 7, 10), (32, 3, 5))]
    p2 = neck.lateral_convs[2](maps[2])
    p1 = neck.lateral_convs[1](maps[1]) + nearest(p2, 7, 10)
    p0 = neck.lateral_convs[0](maps[0]) + nearest(p1, 13, 21)
    wanted = [conv(p) for conv, p in zip(neck.fpn_convs, (p0, p1, p2), strict=True)]
    wanted += [wanted[-1][:, :, ::2, ::2]]
    wanted += [wanted[-1][:, :, ::2, ::2]]
    found = neck(maps)
    assert [tuple(f.shape[2:]) for f in found] == [(13, 21), (7, 10), (3, 5), (2, 3), (1, 2)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert all(conv.scale == 1 and len(conv.widths) == 2 for conv in neck.fpn_convs)
    sum(f.square().mean() for f in found).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_the_neck_stands_behind_a_backbone():
    backbone = make("test_hornet_gf", features_only=True)
    neck = HorFPN(backbone.feature_info.channels(), out_channels=16, num_outs=4, order=3)
    assert [f.shape[1] for f in neck(backbone(image(1, 97, 70)))] == [16] * 4


def test_the_neck_refuses_maps_that_it_was_not_made_for():
    with pytest.raises(GraftError, match="num_outs=2 for 3 maps"):
        HorFPN((8, 16, 32), num_outs=2)
    with pytest.raises(GraftError, match="1 maps for a neck of 2"):
        HorFPN((8, 16), out_channels=8)([torch.zeros(1, 8, 4, 4)])


# -- adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "depthwise"), [("test_hornet", "dwconv"), ("test_hornet_gf", "dwconv.dw")])
def test_conv_adapter_stands_beside_the_depthwise_convolutions_and_those_between_stages(name, depthwise):
    adapter = tg.attach(model := make(name), "conv-adapter", num_classes=3)
    assert adapter is not None
    sites = tg.anatomy(make(name)).find("spatial_conv", "downsample")
    last = [f"stages.{i}.blocks.{j}.gnconv.{depthwise}" for i, j in ((2, 0), (2, 1), (3, 0))]
    assert [s.path for s in sites if s.role == "spatial_conv"][2:] == last
    assert [s.path for s in sites if s.role == "downsample"] == [f"stages.{i}.downsample.1" for i in (1, 2, 3)]
    model(image(2)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


ADAPTERS = {
    "hornet_tiny_7x7": 2_206_536,
    "hornet_tiny_gf": 575_192,
    "hornet_small_7x7": 4_520_364,
    "hornet_small_gf": 1_213_380,
    "hornet_base_7x7": 7_641_232,
    "hornet_base_gf": 2_085_296,
    "hornet_large_7x7": 16_304_088,
    "hornet_large_gf": 4_530_312,
}
"""Adapter parameters of Conv-Adapter at reduction 4, as docs/backbones/hornet.md has them."""


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_documented_sizes_of_conv_adapter_follow_from_its_formula(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    total = 0
    for path, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size[0] > 1 and path != "stem.0":
            width = next(w for w in range(conv.in_channels // 4, 0, -1) if conv.in_channels % w == 0)
            kernel = conv.kernel_size[0] ** 2
            total += conv.in_channels * kernel + width + width * conv.out_channels + 2 * conv.out_channels
    assert total == ADAPTERS[name]
    page = (Path(__file__).parents[2] / "docs" / "backbones" / "hornet.md").read_text(encoding="utf-8")
    assert any(f"`{name}`" in line and f"{total:,}" in line for line in page.splitlines())
