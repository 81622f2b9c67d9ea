"""Finding the cut of an adapted model, and running from it."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchgraft as tg
from torchgraft.core.prefix import Cut, find_cut, from_cut, until_cut
from torchgraft.errors import GraftError
from torchgraft.swap import original_class

MODELS = {
    "resnet": ("test_resnet", {}, "conv-adapter", "stages[2:]", "output of layer2"),
    "efficientnet": ("test_efficientnet", {}, "conv-adapter", "stages[2:]", "output of blocks.1"),
    "convnext": ("test_convnext", {}, "conv-adapter", "stages[2:]", "output of stages.2.downsample.0"),
    "vit": ("test_vit", {"img_size": 32}, "lora", "blocks[3:]", "output of blocks.2"),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)},
        "lora",
        "stages[1:]",
        "output of layers.1.downsample",
    ),
    "rotary": (
        "eva02_tiny_patch14_224",
        {"img_size": 28, "embed_dim": 24, "depth": 3, "num_heads": 2},
        "lora",
        "blocks[2:]",
        "output of blocks.1",
    ),
}
PROBES = {
    "test_resnet": ("output of global_pool", ()),
    "test_vit": ("input of fc_norm", ("img_size", 32)),
    "test_convnext": ("output of head.flatten", ()),
}


def adapted(name, options, method, include=None, **attach):
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    tg.attach(model, method, num_classes=3, include=include, **attach)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0, 0.02)
    return model.train()


def example(side=32):
    return (torch.zeros(1, 3, side, side),), {}


def gradients(model, inputs):
    torch.manual_seed(0)
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), torch.arange(len(inputs)) % 3).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def kept(model, cut, images, dtype):
    with until_cut(model, cut) as prefix:
        return cut.from_rows(cut.to_rows(prefix(images), dtype))


@pytest.fixture
def resnet():
    model = adapted("test_resnet", {}, "conv-adapter", "stages[2:]")
    return model, find_cut(model, example())


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_from_a_float32_cut_are_those_from_the_images_bit_for_bit(kind):
    name, options, method, include, boundary = MODELS[kind]
    model = adapted(name, options, method, include)
    side = options.get("img_size", 32)
    cut = find_cut(model, example(side))
    assert str(cut) == boundary
    images = torch.randn(4, 3, side, side)
    whole = gradients(model, images)
    exact, half = (kept(model, cut, images, dtype) for dtype in (torch.float32, torch.float16))
    with from_cut(model, cut):
        same, close = gradients(model, exact), gradients(model, half)
    assert whole.keys() == same.keys()
    assert all(torch.equal(whole[n], same[n]) for n in whole)
    error = torch.cat([(close[n] - whole[n]).flatten() for n in whole]).norm()
    assert 0 < error < 1e-2 * torch.cat([g.flatten() for g in whole.values()]).norm()


@pytest.mark.parametrize("name", PROBES)
def test_a_linear_probe_keeps_nothing_but_pooled_features(name):
    boundary, option = PROBES[name]
    model = adapted(name, dict([option] if option else []), "linear")
    cut = find_cut(model, example())
    assert str(cut) == boundary
    assert cut.shape == (model.num_features,)


def test_torchvision_models_have_a_cut_too():
    model = torchvision.models.resnet18()
    tg.attach(model, "linear", num_classes=3)
    cut = find_cut(model, example())
    assert str(cut) == "input of fc"
    assert cut.shape == (512,)


def test_channels_last_maps_come_back_in_their_layout(resnet):
    model = resnet[0].to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    cut = find_cut(model, ((images,), {}))
    with until_cut(model, cut) as prefix:
        computed = prefix(images)
    assert computed.is_contiguous(memory_format=torch.channels_last)
    given = cut.from_rows(cut.to_rows(computed, torch.float32))
    assert given.stride() == computed.stride()
    assert torch.equal(given, computed)
    assert torch.equal(*_both(model, cut, images, computed.contiguous()))


def _both(model, cut, images, tensor):
    model.eval()
    whole = model(images)
    with from_cut(model, cut):
        return whole, model(tensor)


def test_nothing_in_front_of_the_cut_runs(resnet, monkeypatch):
    model, cut = resnet
    tensor = kept(model, cut, torch.randn(5, 3, 32, 32), torch.float32)

    def refuse(*args):
        raise AssertionError("it ran")

    for path in cut.skipped:
        for module in model.get_submodule(path).modules():
            if isinstance(module, nn.Conv2d):
                monkeypatch.setattr(module, "_conv_forward", refuse)
    with from_cut(model, cut):
        assert model(tensor).shape == (5, 3)
    with pytest.raises(AssertionError, match="it ran"):
        model(torch.randn(1, 3, 32, 32))


def test_the_model_is_what_it_was_behind_the_with_block_and_after_an_error(resnet):
    model, cut = resnet
    classes = [type(m) for m in model.modules()]
    state = [dict(vars(m)).keys() for m in model.modules()]
    with pytest.raises(ZeroDivisionError), from_cut(model, cut):
        raise ZeroDivisionError
    assert [type(m) for m in model.modules()] == classes
    assert [dict(vars(m)).keys() for m in model.modules()] == state


def test_a_model_copies_and_pickles_while_it_runs_from_a_cut(resnet):
    model, cut = resnet
    tensor = kept(model, cut, torch.randn(2, 3, 32, 32), torch.float32)
    model.eval()
    with from_cut(model, cut):
        expected = model(tensor)
        assert torch.equal(copy.deepcopy(model)(tensor), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(tensor), expected)


def test_a_tensor_of_another_shape_is_refused(resnet):
    model, cut = resnet
    with from_cut(model, cut), pytest.raises(GraftError, match=r"expected \(N, 48, 4, 4\)"):
        model(torch.randn(2, 3, 32, 32))


def test_a_model_runs_from_one_cut_at_a_time(resnet):
    model, cut = resnet
    with from_cut(model, cut), pytest.raises(GraftError, match="already"), from_cut(model, cut):
        pass


def test_what_is_given_is_not_changed_by_operations_in_place():
    model = torchvision.models.resnet18()
    tg.attach(model, "conv-adapter", include="stages[0:]", num_classes=3)
    cut = find_cut(model, example())
    tensor = kept(model, cut, torch.randn(2, 3, 32, 32), torch.float32)
    before = tensor.clone()
    with from_cut(model, cut):
        model(tensor)
    assert torch.equal(tensor, before)


class Crossing(nn.Module):
    """A network in which the stem's output is added to what comes much later."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        stem = self.stem(x)
        x = self.second(self.first(stem).relu()) + stem
        return self.fc(x.mean((2, 3)))


def test_a_boundary_that_a_second_tensor_crosses_is_not_taken():
    model = Crossing()
    tg.attach(model, "lora", include="second")
    assert str(find_cut(model, example(8))) == "output of stem"


class Shared(nn.Module):
    """One activation module for all places, one of them in front of the cut and one behind it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.act(self.two(self.act(self.one(x)))).mean((2, 3)))


def test_a_module_that_runs_on_both_sides_of_the_cut_runs_behind_it():
    model = Shared()
    tg.attach(model, "lora", include="two")
    cut = find_cut(model, example(8))
    assert str(cut) == "input of two"
    assert cut.shared == {"act"}
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(*_both(model, cut, images, kept(model, cut, images, torch.float32)))


def test_a_tap_source_is_behind_the_cut():
    model = adapted("test_resnet", {}, "repnet")
    with pytest.raises(GraftError, match="nothing to keep"):
        find_cut(model, example(64))


FROM_THE_START = {
    "bitfit": ("test_vit", {"img_size": 32}),
    "pad-prompt[image_size=32,prompt_size=4]": ("test_resnet", {}),
}


@pytest.mark.parametrize("method", FROM_THE_START)
def test_adapters_in_the_first_layer_leave_nothing_to_keep(method):
    model = adapted(*FROM_THE_START[method], method)
    with pytest.raises(GraftError, match="the adapter acts as early as in") as error:
        find_cut(model, example())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["adapt", "train"])
def test_statistics_that_follow_the_batches_in_front_of_the_cut_are_refused(policy):
    model = adapted("test_resnet", {}, "conv-adapter", "stages[2:]", batchnorm=policy)
    with pytest.raises(GraftError, match='batchnorm="frozen"'):
        find_cut(model, example())


def test_statistics_do_not_matter_where_nothing_in_front_of_the_cut_has_any():
    model = adapted("test_vit", {"img_size": 32}, "lora", "blocks[3:]", batchnorm="adapt")
    assert str(find_cut(model, example())) == "output of blocks.2"


def test_dropout_in_front_of_the_cut_is_refused():
    options = {"img_size": 32, "proj_drop_rate": 0.1}
    model = adapted("test_vit", options, "lora", "blocks[3:]", dropout=True)
    with pytest.raises(GraftError, match="drops values at random"):
        find_cut(model, example())
    assert isinstance(find_cut(adapted("test_vit", options, "lora", "blocks[3:]"), example()), Cut)


def test_models_that_take_no_images_are_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    tg.attach(model, "lora", include="2")
    with pytest.raises(GraftError, match="no batch of images"):
        find_cut(model)


def test_looking_for_a_cut_leaves_the_model_alone(resnet):
    model = resnet[0]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    find_cut(model, example())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert original_class(model) is timm.models.resnet.ResNet


class Checkpointed(nn.Module):
    """Two layers that are computed again in the backward, together."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = checkpoint(lambda x: self.high(self.low(x)), x, use_reentrant=False)
        return self.fc(x.mean((2, 3)))


def test_a_checkpoint_that_begins_below_the_cut_is_an_error_and_no_wrong_gradient():
    model = Checkpointed()
    tg.attach(model, "lora", include="high")
    cut = find_cut(model, example(8))
    tensor = kept(model, cut, torch.randn(2, 3, 8, 8), torch.float32)
    with from_cut(model, cut), pytest.raises(RuntimeError, match="checkpoint that begins below it"):
        model(tensor).sum().backward()
