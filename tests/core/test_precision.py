"""A frozen backbone in a half type: what trains stays float32, and its results hold for the backbone as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.layers import is_batchnorm
from torchgraft.lean.meter import saved_bytes

from ..properties.cells import REFUSED, Cell
from ..properties.families import logits, run
from .attaching import disturb

SIDE = {"test_resnet": 32, "test_convnext": 32, "test_vit": 160}
FAMILY = {m: "vit" if "test_resnet" in REFUSED.get(m, {}) else "test_resnet" for m in tg.methods()}


def _adapted(
    name: str = "test_resnet", method: str = "conv-adapter", **options: object
) -> tuple[nn.Module, tg.Adapter]:
    torch.manual_seed(0)
    model = timm.create_model(name)
    return model, disturb(tg.attach(model, method, num_classes=5, **options), 0.05)


def _images(name: str = "test_resnet", rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, SIDE[name], SIDE[name], generator=torch.Generator().manual_seed(1))


def _kept(model: nn.Module, x: Tensor) -> int:
    return saved_bytes(lambda: model(x), (*model.parameters(), *model.buffers(), x))


@pytest.mark.parametrize("method", tg.methods())
def test_every_method_trains_in_float32_on_a_bfloat16_backbone(method: str) -> None:
    cell = Cell(method, FAMILY[method])
    cell.model.train()
    wanted, gradients = run(cell.model, cell.batch), cell.gradients()
    tg.cast_frozen(cell.model)
    streams: set[torch.dtype] = set()
    blocks = [cell.model.get_submodule(b.path) for b in tg.anatomy(cell.model).blocks]
    hooks = [b.register_forward_hook(lambda m, args, out: streams.add(out.dtype)) for b in blocks]
    found = logits(cell.model, cell.batch)
    assert streams == {torch.bfloat16}
    for hook in hooks:
        hook.remove()
    assert found.dtype == torch.float32
    assert float((found - wanted).detach().abs().max() / wanted.abs().max()) < 0.1
    for name, gradient in cell.gradients().items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name


def test_frozen_weights_are_rounded_and_batchnorms_and_what_trains_are_not() -> None:
    model, adapter = _adapted()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tg.cast_frozen(model, "bf16")
    norms = {p for p, m in model.named_modules() if is_batchnorm(m)}
    for name, tensor in model.state_dict().items():
        precise = "torchgraft" in name or name.rpartition(".")[0] in norms
        assert tensor.dtype == (before[name].dtype if precise else torch.bfloat16), name
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("lean", ["exact", "off"])
@pytest.mark.parametrize("name", SIDE)
def test_activations_take_half_the_bytes(name: str, lean: str) -> None:
    model, _ = _adapted(name, "conv-adapter" if name != "test_vit" else "lora", lean=lean)
    few, many = _images(name, 2), _images(name, 6)
    plain = _kept(model.train(), many) - _kept(model, few)
    tg.cast_frozen(model)
    # Masks have a bit per element whatever the type.
    assert 0.48 < (_kept(model, many) - _kept(model, few)) / plain < 0.52 + 0.08 * (name == "test_resnet")


def test_lean_keeps_no_rounded_copy_of_what_trains() -> None:
    fixed = []
    for cast in (False, True):
        model, _ = _adapted(lean="exact")
        if cast:
            tg.cast_frozen(model)
        few, many = (_kept(model.train(), _images(rows=rows)) for rows in (1, 2))
        fixed.append(2 * few - many)  # what is kept whatever the batch: products of parameters
    assert fixed[1] <= fixed[0] / 2


def test_gradients_are_those_of_float32_up_to_rounding() -> None:
    grads = []
    for cast in (False, True):
        model, adapter = _adapted()
        if cast:
            tg.cast_frozen(model)
        nn.functional.cross_entropy(model.train()(_images()), torch.arange(4)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in adapter.parameters()]))
    assert float(nn.functional.cosine_similarity(*grads, dim=0)) > 0.99


def test_changes_smaller_than_a_step_of_bfloat16_add_up() -> None:
    model, adapter = _adapted(method="ssf")
    tg.cast_frozen(model)
    scale = next(p for n, p in adapter.named_parameters() if n.endswith("scale"))
    x = _images()
    with torch.no_grad():
        scale.fill_(1.0)
        before = model(x)
        for _ in range(16):
            scale.add_(1e-3)  # 1.001 is 1 in bfloat16
        assert not torch.equal(model(x), before)
    assert torch.allclose(scale, torch.full_like(scale, 1.016), rtol=1e-5)


def test_the_saved_adapter_fits_the_backbone_as_it_was_and_the_rounded_one(tmp_path) -> None:
    model, adapter = _adapted()
    twin = copy.deepcopy(model)
    tg.cast_frozen(model)
    adapter.save(tmp_path)
    tg.detach(twin)
    loaded = tg.load(twin, tmp_path)
    assert all(torch.equal(t, adapter.state_dict()[n]) for n, t in loaded.state_dict().items())
    assert float((twin(_images()) - model(_images())).abs().max()) < 0.05
    tg.load(model, tmp_path, name="again")


def test_other_weights_in_a_rounded_model_are_other_weights(tmp_path) -> None:
    model, adapter = _adapted()
    tg.cast_frozen(model)
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(2)
    adapter.save(tmp_path)
    with pytest.raises(tg.GraftError, match=r"the weights of stages\[0\] differ"):
        tg.load(_adapted()[0], tmp_path, name="other")


def test_copied_and_pickled_rounded_models_are_equal() -> None:
    model, _ = _adapted()
    tg.cast_frozen(model)
    x = _images()
    with torch.no_grad():
        wanted = model.eval()(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), wanted)


def test_an_adapter_that_was_attached_to_a_half_backbone_becomes_float32() -> None:
    model = timm.create_model("test_resnet").to(torch.bfloat16)
    adapter = tg.attach(model, "conv-adapter", num_classes=5)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    tg.cast_frozen(model)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert model(_images()).dtype == torch.float32


def test_casting_again_covers_an_adapter_that_came_later() -> None:
    model, _ = _adapted()
    tg.cast_frozen(model)
    later = tg.attach(model, "bitfit", name="later", num_classes=3)
    tg.cast_frozen(model)
    assert {p.dtype for p in later.parameters()} == {torch.float32}
    model.train()(_images()).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in later.parameters())


@pytest.mark.parametrize(
    ("prepare", "dtype", "message"),
    [
        (lambda: timm.create_model("test_resnet"), "bf16", "nothing is attached"),
        (lambda: _adapted()[0], torch.float32, r"expected torch\.bfloat16 or torch\.float16"),
        (lambda: _adapted()[0], "half", "'half' was given"),
    ],
)
def test_what_makes_no_sense_is_one_line(prepare, dtype, message) -> None:
    model = prepare()
    before = {p.dtype for p in model.parameters()}
    with pytest.raises(tg.GraftError, match=message) as error:
        tg.cast_frozen(model, dtype)
    assert "\n" not in str(error.value)
    assert {p.dtype for p in model.parameters()} == before


def test_a_merged_adapter_is_refused() -> None:
    model, _ = _adapted(method="lora")
    tg.merge(model)
    with pytest.raises(tg.GraftError, match="unmerge first"):
        tg.cast_frozen(model)
