"""Every golden case of a folder: our systems reproduce the numbers of the reference implementations.

Driven by the files alone: ``pytest tests/golden --golden-dir DIR`` runs every NAME.json + NAME.safetensors
of DIR. A system, form or config value without a builder is a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .builders import build
from .case import GoldenCase, StateError
from .compare import count_differences, gradient_differences, value_differences
from .files import CaseFiles, case_names, read_case

MERGED = "_merged"
"""Ending of the outputs that the plain network gives with merged weights."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" not in metafunc.fixturenames:
        return
    folder = _folder(metafunc.config)
    names = case_names(folder) if folder.is_dir() else []
    if not names:
        raise pytest.UsageError(f"--golden-dir {folder} holds no golden case")
    metafunc.parametrize("case_name", names)


@pytest.fixture
def load_case(case_name: str, request: pytest.FixtureRequest) -> Callable[[], Loaded]:
    """Read and build on demand, inside the test, so that a case that cannot be built is a failure."""
    return lambda: _load(_folder(request.config), case_name)


@pytest.fixture
def run_case(case_name: str, request: pytest.FixtureRequest) -> Callable[[], Run]:
    return lambda: _run(_folder(request.config), case_name)


def test_outputs_equal_the_reference(run_case: Callable[[], Run]) -> None:
    run = run_case()
    expected = {n: t for n, t in run.files.tensors["output"].items() if not n.endswith(MERGED)}
    _report(value_differences(run.outputs, expected, run.files.tolerance))


def test_state_after_one_forward_equals_the_reference(run_case: Callable[[], Run]) -> None:
    run = run_case()
    expected = run.case.convert(run.files.tensors["after"])
    ours = {name: run.after[name] for name in expected}
    _report(value_differences(ours, expected, run.files.tolerance))


def test_gradients_equal_the_reference(run_case: Callable[[], Run]) -> None:
    run = run_case()
    of_inputs = {k: v for k, v in run.files.tensors["grad"].items() if k.startswith("input/")}
    of_state = {k: v for k, v in run.files.tensors["grad"].items() if k not in of_inputs}
    expected = {**run.case.convert(of_state), **of_inputs}
    _report(gradient_differences(run.gradients, expected, run.files.tolerance))


def test_merging_equals_the_reference_and_changes_no_output(load_case: Callable[[], Loaded]) -> None:
    loaded = load_case()
    extra, output = loaded.files.tensors["extra"], loaded.files.tensors["output"]
    expected = {n: t for n, t in output.items() if n.endswith(MERGED)}
    if not extra and not expected:
        pytest.skip("the case has no merged form")
    loaded.case.train(False)
    with torch.no_grad():
        merged = loaded.case.merged(loaded.inputs())
    deltas = {n.removeprefix("delta/"): t for n, t in extra.items() if n.startswith("delta/")}
    weights = {n.removeprefix("merged/"): t for n, t in extra.items() if n.startswith("merged/")}
    assert len(deltas) + len(weights) == len(extra), f"unknown extra tensors: {sorted(extra)}"
    _report(value_differences(merged.deltas, deltas, loaded.files.tolerance))
    folded = loaded.case.convert(weights)
    _report(value_differences({n: merged.weights[n] for n in folded}, folded, loaded.files.tolerance))
    wanted = expected or {n: t for n, t in output.items() if n in merged.outputs}
    assert wanted
    ours = {n: merged.outputs[n.removesuffix(MERGED)] for n in wanted}
    _report(value_differences(ours, wanted, loaded.files.tolerance.times(5)))


def test_parameter_counts_equal_the_reference(load_case: Callable[[], Loaded]) -> None:
    loaded = load_case()
    state = loaded.files.tensors["state"]
    dead = sum(t.numel() for k, t in state.items() if loaded.case.is_dead(k) and not _is_buffer(k))
    _report(count_differences(loaded.case.counts(), loaded.files.counts, dead))


def test_frozen_tensors_keep_every_bit_through_forward_and_backward(run_case: Callable[[], Run]) -> None:
    run = run_case()
    changed = [n for n, before in run.frozen_before.items() if not torch.equal(before, run.frozen_after[n])]
    assert not changed


def test_a_second_evaluation_gives_the_same_values(load_case: Callable[[], Loaded]) -> None:
    loaded = load_case()
    loaded.case.train(False)
    with torch.no_grad():
        first = {k: v.clone() for k, v in loaded.case.run(loaded.inputs()).items()}
        second = loaded.case.run(loaded.inputs())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_state_dict_with_a_missing_or_unknown_key_is_refused(load_case: Callable[[], Loaded]) -> None:
    loaded = load_case()
    state, case = dict(loaded.files.tensors["state"]), loaded.case
    for key in state:
        if case.name_of(key) is not None:
            with pytest.raises(StateError):
                case.load({k: v for k, v in state.items() if k != key})
    with pytest.raises(StateError):
        case.load({**state, "no_such.module.weight": torch.zeros(1)})


@dataclass(frozen=True)
class Loaded:
    """A case and our system with its state loaded."""

    files: CaseFiles
    case: GoldenCase

    def inputs(self) -> dict[str, Tensor]:
        """Fresh copies; those whose gradient the reference stores require one."""
        inputs = {name: tensor.clone() for name, tensor in self.files.tensors["input"].items()}
        for name, tensor in inputs.items():
            tensor.requires_grad_(f"input/{name}" in self.files.tensors["grad"])
        return inputs


@dataclass(frozen=True)
class Run:
    """One forward and backward of a loaded case, in its own mode."""

    files: CaseFiles
    case: GoldenCase
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    after: dict[str, Tensor]
    frozen_before: dict[str, Tensor]
    frozen_after: dict[str, Tensor]


def _load(folder: Path, name: str) -> Loaded:
    files = read_case(folder, name)
    torch.manual_seed(0)
    case = build(files)
    case.load(files.tensors["state"])
    return Loaded(files, case)


@lru_cache(maxsize=4)
def _run(folder: Path, name: str) -> Run:
    loaded = _load(folder, name)
    files, case, inputs = loaded.files, loaded.case, loaded.inputs()
    case.train(files.mode == "train")
    frozen_before = _snapshot(case.frozen())
    unstored = case.optional - files.tensors["output"].keys()
    outputs = {name: tensor for name, tensor in case.run(inputs).items() if name not in unstored}
    after = _snapshot(case.state())
    if files.tensors["grad"]:
        case.loss(outputs).backward()
    gradients = {n: p.grad for n, p in case.parameters().items()}
    gradients |= {f"input/{n}": t.grad for n, t in inputs.items()}
    return Run(files, case, outputs, gradients, after, frozen_before, _snapshot(case.frozen()))


def _snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _is_buffer(key: str) -> bool:
    return key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def _folder(config: pytest.Config) -> Path:
    folder: Path = config.getoption("--golden-dir")
    return config.invocation_params.dir / folder


def _report(lines: list[str]) -> None:
    assert not lines, "\n" + "\n".join(lines)
