"""RevCol's memory modes: equal gradients, whatever is frozen or attached, and what is kept for the backward."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchgraft as tg
from torchgraft.backbones import revcol_memory
from torchgraft.backbones.revcol import RevCol, checkpoint_filter_fn
from torchgraft.backbones.revcol_memory import MODES
from torchgraft.backbones.revcol_supervision import compound_loss
from torchgraft.core.graft import graft_point, recomputing
from torchgraft.core.placements import Parallel, Point
from torchgraft.errors import GraftError
from torchgraft.lean import meter

from ..golden.builders.revcol import RevColCase
from ..golden.compare import gradient_differences, value_differences
from ..golden.files import read_case
from .test_revcol import CASE_NAMES, CASES, images, small

saving = pytest.mark.parametrize("mode", ["recompute", "reversible"])
Gradients = dict[str, Tensor | None]


def gradients(model: RevCol, mode: str, x: Tensor | None = None, read: Callable[[Tensor], Tensor] | None = None):
    """Of every parameter that trains, after one step with fixed random numbers."""
    model.set_memory_mode(mode)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    out = model(images(2, 64, 96) if x is None else x)
    (read(out) if read else out.square().sum()).backward()
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


def assert_equal(found: Gradients, wanted: Gradients, mode: str) -> None:
    """To the bit, but for the rounding of the way back."""
    assert found.keys() == wanted.keys()
    floor = 1e-6 * max(float(grad.abs().max()) for grad in wanted.values() if grad is not None)
    for key, grad in wanted.items():
        other = found[key]
        assert (grad is None) == (other is None), key
        if grad is None:
            continue
        if mode == "reversible":
            assert (other - grad).abs().max() <= 2e-5 * grad.abs().max() + floor, key
        else:
            assert torch.equal(other, grad), key
    assert any(grad is not None and grad.abs().max() > 0 for grad in wanted.values())


# -- equal gradients ------------------------------------------------------------------------------------------

FROZEN = {
    "nothing": lambda key: False,
    "the stem": lambda key: key.startswith("stem"),
    "the alphas": lambda key: "alpha" in key,
    "all but gamma and head": lambda key: "gamma" not in key and "head" not in key,
    "the first two columns": lambda key: key.startswith(("stem", "columns.0", "columns.1")),
    "all but the first column": lambda key: not key.startswith("columns.0"),
    "all but one layer": lambda key: key != "columns.1.levels.2.up.proj.weight",
}


@saving
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("top_link", [False, True])
def test_gradients_are_those_of_off_whatever_is_frozen(mode, frozen, top_link):
    model = small(columns=3, top_link=top_link)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](key))
    assert_equal(gradients(model, mode), gradients(model, "off"), mode)


@saving
def test_gradients_are_those_of_off_where_sizes_do_not_halve_and_depth_is_stochastic(mode):
    model = small(columns=3, drop_path_rate=0.5).train()
    x = images(4, 77, 102)
    off = gradients(model, "off", x)
    assert_equal(gradients(model, mode, x), off, mode)
    torch.manual_seed(8)
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    assert not torch.equal(model.stem[0].weight.grad, off["stem.0.weight"]), "other seeds drop other paths"


@saving
def test_random_numbers_go_on_as_if_nothing_had_run_twice(mode):
    model = small(columns=3, drop_path_rate=0.5).train()
    states = []
    for chosen in ("off", mode):
        gradients(model, chosen)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@saving
def test_the_gradient_of_the_image_is_that_of_off(mode):
    model = small(columns=3).requires_grad_(False)
    found = []
    for chosen in ("off", mode):
        model.set_memory_mode(chosen)
        x = images().requires_grad_()
        found.append(torch.autograd.grad(model(x).square().sum(), x)[0])
    assert_equal({"x": found[1]}, {"x": found[0]}, mode)


@saving
def test_autograd_grad_gives_the_gradients_of_chosen_parameters_and_accumulates_none(mode):
    model = small(columns=3)
    chosen = [model.get_parameter(k) for k in ("columns.0.levels.1.alpha", "columns.2.levels.0.up.proj.weight")]
    chosen.append(model.get_parameter("columns.1.levels.3.blocks.0.mlp.fc1.weight"))
    found = {}
    for name in ("off", mode):
        model.set_memory_mode(name)
        found[name] = dict(enumerate(torch.autograd.grad(model(images()).square().sum(), chosen)))
    assert_equal(found[mode], found["off"], mode)
    assert all(p.grad is None for p in model.parameters())


@saving
def test_second_derivatives_are_those_of_off(mode):
    model = small(columns=2)
    weight = model.get_parameter("columns.1.levels.0.blocks.0.mlp.fc1.weight")
    found = {}
    for name in ("off", mode):
        model.set_memory_mode(name)
        (first,) = torch.autograd.grad(model(images()).square().sum(), weight, create_graph=True)
        found[name] = dict(enumerate(torch.autograd.grad(first.square().sum(), [*model.grid()[0][1].parameters()])))
    assert_equal(found[mode], found["off"], "reversible")


@saving
def test_a_second_backward_through_one_graph_gives_the_same(mode):
    model = small(columns=3)
    model.set_memory_mode(mode)
    loss = model(images()).square().sum()
    loss.backward(retain_graph=True)
    first = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    loss.backward()
    assert_equal({k: p.grad for k, p in model.named_parameters()}, first, mode)


@saving
def test_all_maps_and_supervised_columns_may_be_read(mode):
    model = small(columns=4, inter_supv=True).train()
    found = {}
    for name in ("off", mode):
        model.set_memory_mode(name)
        model.zero_grad(set_to_none=True)
        supervised = model.forward_supervised(images())
        loss = compound_loss(supervised, torch.full((2, 3, 64, 64), 0.4), torch.tensor([1, 3])).loss
        loss = loss + sum(m.square().mean() for m in model.forward_intermediates(images(), intermediates_only=True))
        loss.backward()
        found[name] = {k: p.grad for k, p in model.named_parameters()}
    assert_equal(found[mode], found["off"], mode)


@saving
def test_the_first_columns_alone_may_be_differentiated(mode):
    """A loss on an early column reaches the way back before later columns have come along it."""
    model = small(columns=4, inter_supv=True)
    found = {}
    for name in ("off", mode):
        model.set_memory_mode(name)
        model.zero_grad(set_to_none=True)
        supervised = model.forward_supervised(images())
        for logits in supervised.logits:
            logits.square().sum().backward(retain_graph=True)
        found[name] = {k: p.grad for k, p in model.named_parameters() if "decoders" not in k}
    assert_equal(found[mode], found["off"], "reversible")


@saving
def test_autocast_is_on_again_in_the_second_run(mode):
    model = small(columns=3)
    found = {}
    for name in ("off", mode):
        model.set_memory_mode(name)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images()).float().square().sum()
        loss.backward()
        found[name] = {k: p.grad for k, p in model.named_parameters()}
    for key, grad in found["off"].items():
        error = float((found[mode][key] - grad).abs().max() / grad.abs().max().clamp(min=1e-6))
        assert error <= (0.0 if mode == "recompute" else 0.1), key


def test_pure_half_precision_recomputes_the_same_bits():
    model = small(columns=3).bfloat16()
    x = images().bfloat16()
    assert_equal(gradients(model, "recompute", x), gradients(model, "off", x), "recompute")


@saving
def test_channels_last_gives_the_same(mode):
    model = small(columns=3).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    assert_equal(gradients(model, mode, x), gradients(model, "off", x), mode)


@saving
def test_checkpoints_and_offloading_around_the_network_see_what_it_keeps(mode):
    model = small(columns=3)
    off = gradients(model, "off")
    model.set_memory_mode(mode)
    for around in (
        lambda: checkpoint(model, images(2, 64, 96), use_reentrant=False),
        lambda: checkpoint(model, images(2, 64, 96).requires_grad_(), use_reentrant=True),
    ):
        model.zero_grad(set_to_none=True)
        around().square().sum().backward()
        assert_equal({k: p.grad for k, p in model.named_parameters()}, off, mode)
    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.save_on_cpu():
        loss = model(images(2, 64, 96)).square().sum()
    loss.backward()
    assert_equal({k: p.grad for k, p in model.named_parameters()}, off, mode)


@pytest.mark.slow
@saving
def test_compiled_training_runs_as_off(mode):
    model = small(columns=2)
    off = gradients(model, "off")
    model.set_memory_mode(mode)
    model.zero_grad(set_to_none=True)
    torch.compile(model, backend="eager", fullgraph=True)(images(2, 64, 96)).square().sum().backward()
    for key, grad in off.items():
        torch.testing.assert_close(model.get_parameter(key).grad, grad)


@pytest.mark.parametrize(
    "name, mode", [(n, m) for n in CASE_NAMES for m in MODES if (n, m) != ("revcol", "reversible")]
)
@pytest.mark.parametrize("stem", ["trained", "frozen"])
def test_the_golden_cases_hold_in_every_mode_with_and_without_a_frozen_stem(name, mode, stem):
    files, case = _golden(name, mode)
    for key, parameter in case.parameters().items():
        parameter.requires_grad_(stem == "trained" or not key.startswith("stem"))
    outputs = case.run(dict(files.tensors["input"]))
    case.loss(outputs).backward()
    assert not value_differences(outputs, files.tensors["output"], files.tolerance)
    wanted = case.convert(files.tensors["grad"])
    if stem == "frozen":
        assert all(case.parameters()[k].grad is None for k in wanted if k.startswith("stem"))
        wanted = {k: v for k, v in wanted.items() if not k.startswith("stem")}
    found = {k: p.grad for k, p in case.parameters().items()}
    assert not gradient_differences(found, wanted, files.tolerance)


def test_the_golden_case_with_an_alpha_of_zero_is_refused_by_the_way_back():
    files, case = _golden("revcol", "reversible")
    with pytest.raises(GraftError, match=r"min\|alpha\| = 0 over"):
        case.run(dict(files.tensors["input"]))


def test_that_network_goes_back_in_double_precision_once_no_alpha_is_zero():
    files, case = _golden("revcol", "reversible")
    model = case.model.double()
    for level in model.grid()[1]:
        level.keep_zero = False
    x = files.tensors["input"]["image"].double()
    with pytest.warns(UserWarning, match=r"min\|alpha\| = 0.001"):
        found = gradients(model, "reversible", x)
    for key, grad in gradients(model, "off", x).items():
        assert (found[key] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9, key


def _golden(name: str, mode: str):
    files = read_case(CASES, name)
    case = RevColCase(files.config, top_link=name == "revcol_huge", memory=mode)
    case.load(files.tensors["state"])
    return files, case


# -- what is kept ---------------------------------------------------------------------------------------------


def saved(model: RevCol, mode: str, x: Tensor) -> int:
    model.set_memory_mode(mode)
    return meter.saved_bytes(lambda: model(x), [*model.parameters(), x])


def map_bytes(model: RevCol, x: Tensor) -> int:
    """Of the four maps of one column."""
    with torch.no_grad():
        return sum(m.nbytes for m in model.forward_intermediates(x, intermediates_only=True))


@pytest.mark.parametrize("top_link", [False, True])
def test_a_column_more_costs_its_four_maps_or_nothing(top_link):
    x = images(2, 64)
    few, many = small(columns=3, top_link=top_link), small(columns=5, top_link=top_link)
    assert saved(many, "recompute", x) - saved(few, "recompute", x) == 2 * map_bytes(few, x)
    assert saved(many, "reversible", x) == saved(few, "reversible", x) < saved(few, "recompute", x)
    assert saved(few, "recompute", x) < saved(few, "off", x) / 5


@pytest.mark.slow
def test_the_peak_grows_by_no_more_than_what_is_kept():
    x = images(4, 64)
    peaks = {}
    for columns in (3, 5):
        model = small(columns=columns).requires_grad_(False)
        model.stem.requires_grad_(True)  # one gradient whose size does not depend on the number of columns
        for mode in ("recompute", "reversible"):
            model.set_memory_mode(mode)

            def step(model=model) -> None:
                model.zero_grad(set_to_none=True)
                model(x).square().sum().backward()

            step()
            peaks[mode, columns] = meter.peak_bytes(step)
    grows = {mode: (peaks[mode, 5] - peaks[mode, 3]) / 2 for mode in ("recompute", "reversible")}
    assert grows["recompute"] <= map_bytes(model, x)
    assert grows["reversible"] <= 0.01 * map_bytes(model, x)


@saving
def test_nothing_is_kept_where_nothing_trains(mode):
    model = small(columns=3).requires_grad_(False)
    assert saved(model, mode, images()) == 0
    assert model(images()).grad_fn is None
    model.head.requires_grad_(True)
    assert saved(model, mode, images()) == saved(model, "off", images()) > 0


def test_columns_ahead_of_the_first_one_that_trains_keep_nothing_of_their_own():
    model = small(columns=4).requires_grad_(False)
    model.columns[3].requires_grad_(True)
    late = saved(model, "recompute", images())
    model.columns[1:].requires_grad_(True)
    assert late <= saved(model, "recompute", images()) - 2 * map_bytes(model, images())


@saving
def test_all_that_was_kept_is_released_without_the_garbage_collector(mode, monkeypatch):
    alive = weakref.WeakSet()
    for name in ("SecondRun", "_Back", "_Chain"):
        base = getattr(revcol_memory, name)
        monkeypatch.setattr(base, "__init__", _noting(base.__init__, alive))
    model = small(columns=3)
    gc.collect()
    gc.disable()
    try:
        out = gradients(model, mode)
        assert out and not alive
        model(images())  # a forward without a backward
        assert not alive
    finally:
        gc.enable()


def _noting(init, alive: weakref.WeakSet):
    def noting(self, *args, **kwargs) -> None:
        alive.add(self)
        init(self, *args, **kwargs)

    return noting


# -- adapters -------------------------------------------------------------------------------------------------


def adapted(method: str, **options) -> RevCol:
    """A network with one adapter that is moved away from its start."""
    model = small(columns=2).eval()
    torch.manual_seed(3)
    adapter = tg.attach(model, method, num_classes=5, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


@saving
@pytest.mark.parametrize("method", ["conv-adapter", "lora", "ssf", "fact-tt", "repnet", "full"])
def test_gradients_of_adapters_are_those_of_off(method, mode):
    model = adapted(method)
    assert_equal(gradients(model, mode), gradients(model, "off"), mode)


@pytest.mark.parametrize("method", ["conv-adapter", "lora", "repnet"])
@pytest.mark.parametrize("lean", ["exact", "recompute", "checkpoint"])
def test_lean_layers_inside_of_what_runs_twice_change_no_bit(method, lean):
    wanted = gradients(adapted(method, lean=False, fold=False), "off")
    model = adapted(method, lean=lean, fold=False)
    assert_equal(gradients(model, "off"), wanted, "off")
    assert_equal(gradients(model, "recompute"), wanted, "recompute")


@saving
def test_statistics_of_an_adapter_count_a_step_once(mode):
    model = adapted("repnet")
    after = {}
    for name in ("off", mode):
        run = copy.deepcopy(model)
        gradients(run, name)
        after[name] = {k: v for k, v in run.named_buffers() if "running" in k or "tracked" in k}
    assert after["off"] and all(torch.equal(after[mode][k], v) for k, v in after["off"].items())
    assert {int(v) for k, v in after[mode].items() if "tracked" in k} == {1}


@saving
def test_a_batch_norm_inside_a_level_counts_a_step_once(mode):
    model = small(columns=2).train()
    model.grid()[1][1].downsample[1] = nn.BatchNorm2d(12)
    off = copy.deepcopy(model)
    assert_equal(gradients(model, mode), gradients(off, "off"), mode)
    norm, wanted = model.grid()[1][1].downsample[1], off.grid()[1][1].downsample[1]
    assert int(norm.num_batches_tracked) == 1
    assert torch.equal(norm.running_var, wanted.running_var)


@saving
def test_a_hook_can_tell_the_second_run(mode):
    model = small(columns=2)
    model.set_memory_mode(mode)
    runs = []
    model.grid()[1][2].blocks[0].register_forward_hook(lambda *_: runs.append(recomputing()))
    model(images()).sum().backward()
    assert runs == [False, True]


def test_what_changes_the_sum_works_where_maps_are_kept_and_is_refused_on_the_way_back():
    model = small(columns=3)

    def scaled(module: nn.Module, args: object, out: Tensor) -> Tensor:
        return out * 1.1

    handle = model.grid()[0][1].register_forward_hook(scaled)
    assert_equal(gradients(model, "recompute"), gradients(model, "off"), "recompute")
    with pytest.raises(GraftError, match=r"on its way to columns\.0\.levels\.2") as raised:
        gradients(model, "reversible")
    assert "\n" not in str(raised.value)
    handle.remove()
    model.columns[1].register_forward_hook(lambda module, args, out: [out[0] + 1, *out[1:]])
    assert_equal(gradients(model, "recompute"), gradients(model, "off"), "recompute")
    with pytest.raises(GraftError, match=r"on its way to columns\.2\.levels\.0"):
        gradients(model, "reversible")


def test_an_adapter_at_a_level_is_refused_on_the_way_back():
    model = small(columns=2)

    class Doubled:
        def after(self, args: object, kwargs: object, out: Tensor) -> Tensor:
            return 2 * out

    level = model.grid()[0][3]
    graft_point(level).add_action("default", "after", Doubled())
    graft_point(level).select("default")
    assert_equal(gradients(model, "recompute"), gradients(model, "off"), "recompute")
    with pytest.raises(GraftError, match="reversible mode inverts"):
        gradients(model, "reversible")


def test_a_tensor_that_an_adapter_carries_past_a_level_keeps_that_level_as_it_is():
    model = small(columns=2)
    ends = "columns.0.levels.0.blocks.0", "columns.1.levels.0.blocks.0"
    placement = Parallel(nn.Conv2d(8, 8, 1), Point(ends[0], "output"), Point(ends[1], "output"))
    for hook in placement.hooks():
        graft_point(model.get_submodule(hook.path)).add_action("default", hook.when, hook.action)
    for path in ends:
        graft_point(model.get_submodule(path)).select("default")
    graft_point(model.get_submodule(ends[1])).add_placement("default", "side", placement)
    assert_equal(gradients(model, "recompute"), gradients(model, "off"), "recompute")
    with pytest.raises(GraftError, match=r"past the maps of columns\.0\.levels\.0"):
        gradients(model, "reversible")


@saving
def test_switching_adapters_between_forward_and_backward_is_an_error(mode):
    model = adapted("lora")
    tg.attach(model, "lora", name="other", num_classes=5)
    model.set_memory_mode(mode)
    loss = model(images()).square().sum()
    tg.activate(model, "default")
    with pytest.raises(GraftError, match="switched between forward and backward") as raised:
        loss.backward()
    assert "\n" not in str(raised.value)


def test_rows_with_adapters_of_their_own_have_the_gradients_of_off():
    model = adapted("conv-adapter")
    tg.attach(model, "lora", name="other", num_classes=5)
    model.eval()
    found = {}
    for mode in ("off", "recompute"):
        model.set_memory_mode(mode)
        model.zero_grad(set_to_none=True)
        with tg.route(model, ["default", "other"]):
            loss = model(images()).square().sum()
        loss.backward()
        found[mode] = {k: p.grad for k, p in model.named_parameters()}
    assert_equal(found["recompute"], found["off"], "recompute")
    model.set_memory_mode("reversible")
    with tg.route(model, ["default", "other"]), pytest.raises(GraftError, match="chosen by row"):
        model(images())


# -- when the way back is accurate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alpha, columns, dtype, verdict",
    [
        (0.9, 16, torch.float32, "fine"),
        (0.5, 4, torch.float32, "fine"),
        (0.5, 6, torch.float32, "warns"),
        (0.5, 9, torch.float32, "warns"),
        (0.5, 10, torch.float32, "refuses"),
        (0.1, 4, torch.float32, "refuses"),
        (0.1, 5, torch.float64, "fine"),
        (0.1, 8, torch.float64, "refuses"),
        (0.99, 2, torch.float16, "refuses"),
        (0.99, 2, torch.bfloat16, "refuses"),
    ],
)
def test_the_error_bound_decides(alpha, columns, dtype, verdict):
    model = RevCol(dims=(4, 4, 4, 4), depths=(1, 1, 1, 1), columns=columns, num_classes=2, memory="reversible")
    for levels in model.grid()[1:]:
        for level in levels:
            nn.init.constant_(level.alpha, 1.0)
        nn.init.constant_(levels[3].alpha, -alpha)
    for level in model.grid()[0]:
        nn.init.zeros_(level.alpha)  # of no effect
    model.to(dtype)
    x = images(1, 32).to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if verdict == "refuses":
            with pytest.raises(GraftError, match="recompute") as raised:
                model(x)
            assert "\n" not in str(raised.value)
        else:
            model(x), model(x)
    told = [str(w.message) for w in caught if "alpha" in str(w.message)]
    assert len(told) == (verdict == "warns")
    with torch.no_grad():
        model(x)  # nothing to go back for


def test_changed_alphas_are_looked_at_again():
    model = small(columns=2, memory="reversible")
    model(images())
    nn.init.constant_(model.grid()[1][0].alpha, 1e-3)
    with pytest.raises(GraftError, match=r"min\|alpha\| = 0.001 over 2 columns"):
        model(images())


def test_a_pruned_network_cannot_go_back():
    model = small(columns=2, memory="reversible")
    model.prune_intermediate_layers([1])
    with pytest.raises(GraftError, match="pruned"):
        model.forward_intermediates(images())


def test_taps_that_stop_early_keep_the_levels_that_the_way_back_starts_from():
    model = small(columns=3)
    found = {}
    for mode in MODES:
        model.set_memory_mode(mode)
        model.zero_grad(set_to_none=True)
        taps = model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
        taps[0].square().sum().backward()
        found[mode] = {k: p.grad for k, p in model.named_parameters()}
    for mode in ("recompute", "reversible"):
        assert_equal(found[mode], found["off"], mode)


def test_the_smallest_alpha_is_told(caplog):
    with caplog.at_level("INFO", "torchgraft.backbones.revcol"):
        small(columns=2).set_memory_mode("reversible")
        case = read_case(CASES, "revcol")
        checkpoint_filter_fn(dict(case.tensors["state"]), small(columns=2))
    assert "min|alpha| = 0.7" in caplog.text
    assert "the checkpoint has min|alpha| = 0" in caplog.text


# -- several processes ----------------------------------------------------------------------------------------

DISTRIBUTED = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
sys.path.insert(0, {root!r})
from tests.backbones.test_revcol import small

rank = int(os.environ["RANK"])
torch.set_num_threads(1)
dist.init_process_group("gloo")
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(rank))
for mode in ("recompute", "reversible"):
    for find in (False, True):
        for frozen in ((), ("stem", "columns.0")):
            model = small(columns=3, drop_path_rate=0.3).train()
            for key, parameter in model.named_parameters():
                parameter.requires_grad_(not key.startswith(frozen) if frozen else True)
            alone = {{}}
            model.set_memory_mode("off")
            torch.manual_seed(rank)
            model(x).square().sum().backward()
            for key, parameter in model.named_parameters():
                if parameter.grad is not None:
                    mean = parameter.grad / 2
                    dist.all_reduce(mean)
                    alone[key] = mean
            model.zero_grad(set_to_none=True)
            model.set_memory_mode(mode)
            together = DDP(model, find_unused_parameters=find)
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                torch.manual_seed(rank)
                together(x).square().sum().backward()
            for key, mean in alone.items():
                torch.testing.assert_close(model.get_parameter(key).grad, mean, rtol=1e-4, atol=1e-4)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_either_kind_of_data_parallelism(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED.format(root=str(CASES.parents[2])))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run(command, check=True, timeout=300)
