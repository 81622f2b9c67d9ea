"""What timm asks of every model, asked of every backbone that we register in it."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from torchgraft.backbones.timm_api import FeatureGetterNet

from .architectures import NAMES, SMALL, make, module_of

small = pytest.mark.parametrize("name", SMALL)
every = pytest.mark.parametrize("name", NAMES)


def image(rows: int = 1, height: int = 64, width: int | None = None, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def side_of(model: nn.Module) -> int:
    return model.pretrained_cfg["input_size"][-1]


def same(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert not a.isnan().any()
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("test_")])
def test_parameters_channels_and_strides_are_those_published(name):
    published = module_of(name).PUBLISHED[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == published.parameters
    taps = model.feature_info if isinstance(model.feature_info, list) else model.feature_info.info
    pyramid = [tap for tap in taps if tap["reduction"] >= 4]
    assert tuple(t["num_chs"] for t in pyramid) == published.channels
    assert tuple(t["reduction"] for t in pyramid) == published.strides


@small
def test_forward_gives_numbers_and_the_same_with_checkpointing(name):
    model = make(name)
    x = image(1, side_of(model))
    out = model(x)
    assert out.shape == (1, model.num_classes)
    model.set_grad_checkpointing()
    same(model(x), out)


@small
def test_every_parameter_gets_a_gradient(name):
    model = make(name, num_classes=42).train()
    out = model(image(2))
    assert out.shape == (2, 42)
    out.mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert not any(p.grad.isnan().any() for p in model.parameters())


@every
def test_an_unknown_argument_is_an_error(name):
    with torch.device("meta"), pytest.raises(TypeError):
        timm.create_model(name, no_such_argument=1)


@every
def test_the_default_configuration_describes_the_model(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        cfg = model.default_cfg
        state = model.state_dict()
        x = torch.zeros(1, *cfg["input_size"])
        if max(cfg["input_size"]) > 400 and not name.startswith("test_"):
            x = torch.zeros(1, 3, 384, 384)
    assert cfg["first_conv"] + ".weight" in state
    assert cfg["classifier"] + ".weight" in state
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.in_chans == cfg["input_size"][0] and model.num_classes == cfg["num_classes"]
    assert not cfg["url"] and not cfg.get("hf_hub_id")
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None
    assert set(model.no_weight_decay()) <= set(state) if hasattr(model, "no_weight_decay") else True
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) > 1
    assert len(group_parameters(model, model.group_matcher(coarse=True))) > 1
    side = tuple(size * x.shape[-1] // cfg["input_size"][-1] for size in cfg["pool_size"])
    with torch.device("meta"):
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *side)
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model(x).shape == (1, model.head_hidden_size)


@small
def test_without_pooling_the_output_is_a_map(name):
    model = make(name)
    x = image(1, side_of(model))
    size = model.default_cfg["pool_size"]
    if model.head_hidden_size == model.num_features:
        model.reset_classifier(0, "")
        assert model(x).shape == (1, model.num_features, *size)
    unpooled = make(name, num_classes=0, global_pool="")
    assert unpooled(x).dim() == 4
    assert make(name, num_classes=0)(x).shape == (1, unpooled.head_hidden_size)


@small
def test_half_precision_goes_in_and_comes_out(name):
    model = make(name)
    model(image())
    out = model.to(torch.bfloat16)(image().bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@every
def test_everything_is_made_on_the_named_device(name):
    model = timm.create_model(name, device="meta", dtype=torch.float32)
    elsewhere = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type != "meta"]
    assert not elsewhere


@small
def test_a_new_classifier_has_the_device_type_and_mode_of_the_model(name):
    model = timm.create_model(name, device="meta", dtype=torch.float64).eval()
    model.reset_classifier(0)
    model.reset_classifier(2)
    head = model.get_classifier()
    assert head.weight.device.type == "meta" and head.weight.dtype == torch.float64 and not head.training
    assert not any(m.training for m in model.modules())


@small
def test_resetting_the_classifier_of_a_frozen_model_makes_nothing_trainable(name):
    model = make(name).requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, "")
    assert not any(p.requires_grad for p in model.parameters())


@small
def test_torchscript_gives_the_same(name):
    model = make(name)
    x = image(1, 96)
    same(torch.jit.script(model)(x), model(x))


@small
@pytest.mark.parametrize("wrapper", [None, "getter"])
def test_features_only_gives_maps_of_the_named_channels_and_strides(name, wrapper):
    options = {} if wrapper is None else {"feature_cls": wrapper}
    model = make(name, features_only=True, **options)
    maps = model(image(1, 96))
    assert len(maps) == len(model.feature_info.channels()) >= 3
    for found, channels, stride in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert found.shape[1] == channels
        assert 96 / (2 * stride) < found.shape[-1] <= math.ceil(96 / stride) + 1
        assert not found.isnan().any()
    assert {4, 8, 16, 32} <= set(model.feature_info.reduction())


@small
def test_both_wrappers_and_forward_intermediates_give_equal_maps(name):
    whole = make(name)
    x = image(1, 96)
    state = whole.state_dict()
    getter = FeatureGetterNet(copy.deepcopy(whole), out_indices=len(whole.feature_info))
    listed = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    listed.eval()
    final, taps = whole.forward_intermediates(x)
    same(final, whole.forward_features(x), rtol=1e-5)
    wanted = [taps[i] for i in range(len(taps))][-len(listed(x)) :]
    for a, b, c in zip(listed(x), getter(x)[-len(wanted) :], wanted, strict=True):
        same(a, c)
        same(b, c)


@small
def test_forward_intermediates_is_the_same_with_checkpointing(name):
    model = make(name)
    x = image(1, 96)
    before = model.forward_intermediates(x, intermediates_only=True)
    model.set_grad_checkpointing()
    for a, b in zip(model.forward_intermediates(x, intermediates_only=True), before, strict=True):
        same(a, b)


@small
def test_fx_traces_the_features(name):
    model = make(name)
    x = image(2, 96)
    nodes = get_graph_node_names(model)[1]
    traced = create_feature_extractor(model, eval_return_nodes=[nodes[-1]], train_return_nodes=[nodes[-1]])
    same(next(iter(traced.eval()(x).values())), model(x))
    same(torch.jit.script(traced)(x)[nodes[-1]], model(x))
    next(iter(traced.train()(x).values())).mean().backward()
    assert all(p.grad is not None for p in traced.parameters())


@small
@pytest.mark.parametrize("last", [0, -1])
def test_pruning_keeps_what_the_taps_need_and_nothing_else(name, last):
    model = make(name)
    x = image(2, 96)
    count = len(model.feature_info)
    index = range(count)[last]
    wanted = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
    early = model.forward_intermediates(x, indices=[index], intermediates_only=True, stop_early=True)[0]
    same(early, wanted)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([index], prune_norm=True) == [index]
    found = pruned.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
    same(found, wanted)
    assert pruned.num_features == model.feature_info[index]["num_chs"]
    found.mean().backward()
    unused = [n for n, p in pruned.named_parameters() if p.grad is None]
    assert not unused


@small
def test_pruning_nothing_changes_nothing(name):
    model = make(name)
    x = image(2, 96)
    out = model(x)
    model.prune_intermediate_layers([len(model.feature_info) - 1], prune_head=False)
    same(model(x), out)


@small
def test_the_head_has_the_width_that_the_model_names(name):
    for pooling in ("avg", "catavgmax"):
        model = make(name, num_classes=0)
        try:
            model.reset_classifier(7, pooling)
        except AssertionError:
            # A head that cannot take it refuses at creation too.
            with pytest.raises(AssertionError):
                make(name, global_pool=pooling)
            continue
        features = model.forward_features(image())
        assert model.forward_head(features, pre_logits=True).shape[-1] == model.head_hidden_size
        assert model(image()).shape == (1, 7)


@small
def test_a_pruned_model_takes_a_new_head(name):
    model = make(name)
    model.prune_intermediate_layers([len(model.feature_info) - 2])
    model.reset_classifier(7, "avg")
    features = model.forward_features(image())
    assert model.forward_head(features, pre_logits=True).shape[-1] == model.head_hidden_size
    assert model(image()).shape == (1, 7)


@small
def test_resetting_the_classifier_keeps_the_pooling(name):
    model = make(name)
    keeps = make(name, global_pool="max") if takes(name, "max") else model
    x = image()
    before = keeps.forward_head(keeps.forward_features(x), pre_logits=True)
    keeps.reset_classifier(5)
    same(keeps.forward_head(keeps.forward_features(x), pre_logits=True), before)


def takes(name: str, pooling: str) -> bool:
    try:
        make(name, global_pool=pooling)
    except AssertionError:
        return False
    return True


@small
def test_features_have_the_same_gradients_with_checkpointing(name):
    gradients = []
    for checkpointing in (False, True):
        model = make(name, features_only=True).train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        model.set_grad_checkpointing(checkpointing)
        sum(m.square().mean() for m in model(image(2, 96).requires_grad_())).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][key] is None), key
        if gradient is not None:
            same(gradients[1][key], gradient, atol=1e-6)


@small
def test_a_scripted_feature_getter_gives_the_same(name):
    getter = FeatureGetterNet(make(name))
    x = image(1, 96)
    for a, b in zip(torch.jit.script(getter)(x), getter(x), strict=True):
        same(a, b)


@small
@pytest.mark.parametrize("headless", [False, True])
def test_our_own_state_passes_the_converter_untouched(name, headless):
    model = make(name, **({"num_classes": 0} if headless else {}))
    state = model.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    converted = module_of(name).checkpoint_filter_fn(state, model)
    assert list(converted) == list(before)
    assert all(converted[k].equal(before[k]) and state[k].equal(before[k]) for k in before)
    other = make(name, **({"num_classes": 0} if headless else {}))
    other.load_state_dict(converted, strict=True)
    x = image(2, 64, 96)
    assert torch.equal(other(x), model(x))


@small
@pytest.mark.parametrize("height, width", [(33, 47), (50, 76), (97, 65), (64, 160)])
def test_any_size_of_image_works(name, height, width):
    model = make(name)
    out = model(image(2, height, width))
    assert out.isfinite().all()
    maps = model.forward_intermediates(image(1, height, width), intermediates_only=True)
    for found, tap in zip(maps, model.feature_info, strict=True):
        for size, given in zip(found.shape[-2:], (height, width), strict=True):
            assert given // tap["reduction"] <= size <= math.ceil(given / tap["reduction"])


@small
def test_it_exports_and_compiles_as_one_graph(name):
    model = make(name)
    x = image(2)
    wanted = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (x,))
    same(exported.module()(x), wanted)
    same(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)


@small
def test_channels_last_gives_the_same(name):
    model = make(name)
    x = image(2)
    wanted = model(x)
    found = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    same(found, wanted)


@small
def test_autocast_stays_near(name):
    model = make(name)
    x = image(2)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max() + 0.02


@small
def test_other_numbers_of_input_channels_and_classes_load(name):
    state = make(name).state_dict()
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, in_chans=1, num_classes=3
    )
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    first = model.get_parameter(model.default_cfg["first_conv"] + ".weight")
    same(first, state[model.default_cfg["first_conv"] + ".weight"].sum(1, keepdim=True))


@small
def test_nothing_is_written_in_place_on_an_output_that_a_hook_may_keep(name):
    model = make(name)
    kept, copies = [], []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, a, out: (kept.append(out), copies.append(out.clone()))[0])
    model(image())
    assert kept
    assert all(a.equal(b) for a, b in zip(kept, copies, strict=True))


@every
def test_its_description_names_the_paper_and_says_where_weights_are(name):
    model_file = inspect.getdoc(module_of(name))
    assert re.search(r"arXiv:\d{4}\.\d{5}", model_file or ""), "the module docstring names the paper: arXiv:NNNN.NNNNN"
