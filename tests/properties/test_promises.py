"""What every registered method promises on every family of backbones.

All tests of one cell share its network: pytest runs them together, because the fixture has a parameter.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import torchgraft as tg
from torchgraft.lean import saved

from .cells import MOVED_START, SPECS, Cell, Gradients, assert_close, assert_same_gradients, disturb, loss
from .families import FAMILIES, logits, network, rows, run
from .snapshot import Snapshot


def test_attaching_adds_and_changes_nothing_that_was_there(cell: Cell) -> None:
    model = network(cell.family).requires_grad_(False)
    plain = run(model, cell.batch)
    classes = {path: type(m) for path, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = Snapshot(model)
    adapter = cell.attach(model, head=False)
    before.assert_backbone_kept()
    assert all(isinstance(model.get_submodule(path), cls) for path, cls in classes.items())
    assert model.load_state_dict(state, strict=True) is not None
    start = run(model, cell.batch)
    if cell.method in MOVED_START:
        assert not torch.allclose(start, plain, rtol=1e-3, atol=1e-3)
    else:
        assert_close(start, plain, 1e-6)
    disturb(adapter)
    assert not torch.allclose(run(model, cell.batch), start, rtol=1e-4, atol=1e-4)
    tg.activate(model, None)
    assert torch.equal(run(model, cell.batch), plain)


def test_a_plan_counts_what_attaching_adds_and_leaves_the_model_alone(cell: Cell) -> None:
    model = network(cell.family)
    before = Snapshot(model)
    classes = cell.adapter.num_classes
    plan = tg.plan(model, SPECS.get(cell.method, cell.method), num_classes=classes)
    before.assert_same()
    trainable = [p for p in cell.model.parameters() if p.requires_grad]
    assert plan.parameters == cell.adapter.num_parameters()
    assert plan.head_parameters == cell.adapter.head_parameters()
    assert plan.parameters + plan.head_parameters == sum(p.numel() for p in trainable)
    assert plan.flops is not None and plan.flops > 0


def test_the_gradient_reaches_every_trainable_tensor_and_no_other(cell: Cell) -> None:
    own = {id(p) for p in cell.adapter.parameters()}
    trainable = {n: p for n, p in cell.model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trainable.values()} == own
    cell.model.train()
    found = cell.gradients()
    cell.model.eval()
    assert [n for n, g in found.items() if g is None] == []
    assert [n for n, g in found.items() if g is not None and not g.isfinite().all()] == []
    assert [n for n, g in found.items() if g is not None and not g.any()] == []


def test_training_steps_change_what_the_adapter_owns_and_nothing_else(cell: Cell) -> None:
    before = Snapshot(cell.model)
    kept = {n: t.clone() for n, t in cell.adapter.state_dict().items()}
    optimizer = torch.optim.AdamW(cell.adapter.parameters(), lr=1e-3)
    cell.model.train()
    held = [p for p, m in cell.model.named_modules() if isinstance(m, (_BatchNorm, nn.Dropout)) and m.training]
    assert [p for p in held if "torchgraft" not in p.split(".")] == []
    for _ in range(2):
        optimizer.zero_grad()
        loss(logits(cell.model, cell.batch)).backward()
        optimizer.step()
    cell.model.zero_grad(set_to_none=True)
    cell.model.eval()
    assert not any(m.training for m in cell.model.modules())
    owned = {t.data_ptr() for t in cell.adapter.state_dict().values()}
    rest = {k for k, t in cell.model.state_dict().items() if t.data_ptr() not in owned}
    assert {k for k in before.bits if "torchgraft" not in k.split(".")} <= rest
    assert before.changed(rest) == []
    still = [n for n, t in cell.adapter.state_dict().items() if torch.equal(t, kept[n])]
    assert [n for n in still if not n.endswith("num_batches_tracked")] == []


def test_a_saved_adapter_gives_the_same_bits_on_a_fresh_twin(cell: Cell, tmp_path: Path) -> None:
    cell.adapter.save(tmp_path / "adapter")
    twin = network(cell.family)
    loaded = tg.load(twin, tmp_path / "adapter")
    assert loaded.method == cell.adapter.method
    assert torch.equal(run(twin, cell.batch), run(cell.model, cell.batch))


def test_copied_and_pickled_models_are_equal_and_independent(cell: Cell) -> None:
    out = run(cell.model, cell.batch)
    for twin in (copy.deepcopy(cell.model), pickle.loads(pickle.dumps(cell.model))):
        assert torch.equal(run(twin, cell.batch), out)
        theirs = tg.adapters(twin)["default"]
        assert theirs.model is twin
        mine = {t.data_ptr() for t in cell.model.state_dict().values() if t.numel()}
        assert not any(t.data_ptr() in mine for t in twin.state_dict().values() if t.numel())
        disturb(theirs, seed=5)
        assert not torch.equal(run(twin, cell.batch), out)
        assert torch.equal(run(cell.model, cell.batch), out)
        tg.detach(twin)
        assert torch.equal(run(twin, cell.batch), run(network(cell.family), cell.batch))


def test_reduced_precision_gives_finite_and_similar_values(cell: Cell) -> None:
    cell.model.train()
    wanted = run(cell.model, cell.batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(cell.model, cell.batch)
    loss(found).backward()
    grads = [p.grad for p in cell.adapter.parameters()]
    cell.model.zero_grad(set_to_none=True)
    cell.model.eval()
    assert [g for g in grads if g is not None and not g.isfinite().all()] == []
    assert_close(found.detach(), wanted, 0.2)


def test_channels_last_gives_the_same_values(cell: Cell) -> None:
    if not FAMILIES[cell.family].side:
        pytest.skip("reads ids")
    wanted, grads = run(cell.model, cell.batch), cell.gradients()
    cell.model.to(memory_format=torch.channels_last)
    contiguous, cell.batch = cell.batch, _channels_last(cell.batch)
    try:
        assert_close(run(cell.model, cell.batch), wanted)
        assert_same_gradients(cell.gradients(), grads, 0.05)  # a rounded value may cross the kink of a ReLU
    finally:
        cell.batch = contiguous
        cell.model.to(memory_format=torch.contiguous_format)


def test_gradient_checkpointing_keeps_the_gradients_and_counts_a_batch_once(cell: Cell) -> None:
    if not _checkpointing(cell.model, True):
        pytest.skip("the model has none")
    before = {n: t.clone() for n, t in cell.adapter.state_dict().items()}
    runs = []
    for on in (False, True):
        _checkpointing(cell.model, on)
        cell.adapter.load_state_dict(before)
        cell.model.train()
        torch.manual_seed(0)  # a method's own dropout
        grads, count = _counted(cell)
        cell.model.eval()
        runs.append((grads, count, {n: t.clone() for n, t in cell.adapter.state_dict().items()}))
    _checkpointing(cell.model, False)
    (grads, plain, state), (again, recomputed, other) = runs
    assert_same_gradients(again, grads)
    assert [n for n, t in state.items() if not torch.equal(t, other[n])] == []
    if cell.method not in BEHIND:
        assert recomputed > plain


def test_lean_layers_change_no_bit_of_any_gradient(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "DROPPED_AS_NAN", True)  # what is dropped must not be read
    found: dict[str | None, Gradients] = {}
    for level in (None, "exact", "recompute", "checkpoint"):
        cell.adapter.lean = level
        tg.activate(cell.model, cell.adapter.name)
        cell.model.train()
        torch.manual_seed(0)  # a method's own dropout
        found[level] = cell.gradients()
        cell.model.eval()
    cell.adapter.lean = "exact"
    tg.activate(cell.model, cell.adapter.name)
    plain = found.pop(None)
    for level, gradients in found.items():
        differing = [n for n, g in plain.items() if g is not None and not torch.equal(g, gradients[n])]  # type: ignore[arg-type]
        assert differing == [], level


def test_rows_routed_through_two_adapters_come_out_as_if_run_apart(cell: Cell) -> None:
    second = disturb(cell.attach(cell.model, "second"), seed=7)
    names = ["second", None, "default", "second"]
    batch = FAMILIES[cell.family].batch(rows=len(names))
    apart = []
    for i, name in enumerate(names):
        tg.activate(cell.model, name)
        apart.append(run(cell.model, rows(batch, i)))
    tg.activate(cell.model, "default")
    with tg.route(cell.model, names):
        together = run(cell.model, batch)
    assert tg.core.active(cell.model) == "default"
    tg.detach(cell.model, "second")
    assert len({*map(id, second.parameters())} & {*map(id, cell.model.parameters())}) == 0
    for i in range(len(names)):
        assert_close(together[i : i + 1], apart[i])


def test_merging_changes_no_output_and_is_undone_to_the_bit(cell: Cell) -> None:
    disturb(cell.attach(cell.model, "folded", head=False), seed=8)
    before = Snapshot(cell.model)
    apart = run(cell.model, cell.batch)
    report = tg.merge(cell.model, "folded")
    merged = run(cell.model, cell.batch)
    assert_close(merged, apart)
    assert all(site.merged or site.reason for site in report.sites)
    if report.complete and not report.plain:  # a plain layer would standardise the folded weight once more
        plain = {k: v for k, v in cell.model.state_dict().items() if "torchgraft" not in k.split(".")}
        twin = network(cell.family)
        assert {k for k in plain if k not in twin.state_dict()} == set(report.created)
        for key in report.created:  # a bias where the backbone has none
            path, _, leaf = key.rpartition(".")
            twin.get_submodule(path).register_parameter(leaf, nn.Parameter(torch.zeros_like(plain[key])))
        twin.load_state_dict(plain)
        # A plain model that ties two weights cannot hold two that differ (an adapted output layer of T5).
        untied = any(not torch.equal(t, plain[k]) for k, t in twin.state_dict().items())
        assert not untied or cell.family == "hf_t5"
        if not untied:
            assert_close(run(twin, cell.batch), apart)
    tg.unmerge(cell.model)
    before.assert_same()
    assert torch.equal(run(cell.model, cell.batch), apart)
    tg.detach(cell.model, "folded")


def test_detaching_brings_back_the_very_model(cell: Cell) -> None:
    plain = network(cell.family)
    state, out = plain.state_dict(), run(plain, cell.batch)
    tg.detach(cell.model)
    assert list(cell.model.state_dict()) == list(state)
    assert all(torch.equal(t, state[k]) for k, t in cell.model.state_dict().items())
    assert torch.equal(run(cell.model, cell.batch), out)
    # A state as users leave it: some parameters frozen, training, but with a norm held in eval mode.
    for i, parameter in enumerate(cell.model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    cell.model.train()
    held = next((m for m in cell.model.modules() if "Norm" in type(m).__name__), cell.model)
    held.eval()
    before = Snapshot(cell.model)
    cell.attach(cell.model)
    tg.detach(cell.model)
    before.assert_same()
    cell.model.eval()
    cell.adapter = disturb(cell.attach(cell.model))


BEHIND = ("linear", "partial")
"""Methods that train behind the checkpointed part, where there is nothing to compute a second time."""


def _channels_last(batch: dict) -> dict:
    return {"args": tuple(a.contiguous(memory_format=torch.channels_last) for a in batch["args"]), "kwargs": {}}


def _checkpointing(model: nn.Module, on: bool) -> bool:
    """Switch the model's own gradient checkpointing; False when it has none."""
    try:
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(on)
        elif getattr(model, "supports_gradient_checkpointing", False):
            model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()
        else:
            return False
    except AssertionError:
        return False
    return True


def _counted(cell: Cell) -> tuple[Gradients, int]:
    """Gradients, and how many modules ran for them."""
    count = 0

    def hook(module: nn.Module, args: object) -> None:
        nonlocal count
        count += not any(True for _ in module.children())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        grads = cell.gradients()
    finally:
        handle.remove()
    return grads, count
