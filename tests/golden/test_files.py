"""A golden case that is incomplete, contradictory or unknown is refused with a message that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .builders import build
from .files import CaseError, case_names, read_case


def write_case(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
    header = {
        "system": "baselines",
        "case": "c",
        "kind": "module",
        "config": {"form": "modules", "modules": {}},
        "mode": "eval",
        "inputs": {"x": {"shape": [2], "dtype": "float32", "meaning": "input"}},
        "outputs": {"y": "output"},
        "tolerance": {"abs": 1e-6, "rel": 1e-5, "grad_abs": 1e-6, "grad_rel": 1e-4},
        "param_count": None,
        "trainable_count": None,
        "adapter_count": None,
    }
    (folder / "c.json").write_text(json.dumps(header | changes), encoding="utf-8")
    save_file(tensors or {"input/x": torch.ones(2), "output/y": torch.ones(2)}, folder / "c.safetensors")


def test_a_complete_case_is_read(tmp_path: Path) -> None:
    write_case(tmp_path)
    case = read_case(tmp_path, "c")
    assert (case.system, case.form, case.mode) == ("baselines", "modules", "eval")
    assert set(case.tensors["input"]) == {"x"}


def test_half_a_case_is_found_and_refused(tmp_path: Path) -> None:
    write_case(tmp_path)
    (tmp_path / "c.json").unlink()
    assert case_names(tmp_path) == ["c"]
    with pytest.raises(CaseError, match=r"c\.json is missing"):
        read_case(tmp_path, "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "both"}, "unknown mode 'both'"),
        ({"config": {}}, "no 'form'"),
        ({"outputs": {"z": "output"}}, "outputs of the JSON file and of the tensors differ in y, z"),
        ({"inputs": {"x": {"shape": [3]}}}, "input 'x' has shape"),
    ],
)
def test_a_contradiction_between_the_files_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_case(tmp_path, **changes)
    with pytest.raises(CaseError, match=message):
        read_case(tmp_path, "c")


def test_a_tensor_outside_the_schema_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path, {"input/x": torch.ones(2), "output/y": torch.ones(2), "weights/w": torch.ones(2)})
    with pytest.raises(CaseError, match="'weights/w' has none of the prefixes"):
        read_case(tmp_path, "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "no_such_system"}, "no builder for system 'no_such_system' yet"),
        ({"config": {"form": "vit"}}, "baselines has no form 'vit'"),
        ({"config": {"form": "modules"}}, "the config lacks 'modules'"),
    ],
)
def test_an_unknown_system_form_or_config_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_case(tmp_path, **changes)
    with pytest.raises(CaseError, match=message):
        build(read_case(tmp_path, "c"))
