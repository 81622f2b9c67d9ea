"""Read one golden case, ``NAME.json`` and ``NAME.safetensors``, and check that the two belong together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .compare import Tolerance

_REQUIRED = (
    "system",
    "case",
    "kind",
    "config",
    "mode",
    "inputs",
    "outputs",
    "tolerance",
    "param_count",
    "trainable_count",
    "adapter_count",
)
_PREFIXES = ("state", "input", "output", "grad", "after", "extra")


class CaseError(Exception):
    """The files of a case are incomplete, contradict each other or ask for something unknown."""


@dataclass(frozen=True)
class CaseFiles:
    """What the two files of a case say.

    Attributes:
        tensors: Prefix (``state``, ``input``, ``output``, ``grad``, ``after``, ``extra``) -> name -> tensor.
    """

    name: str
    system: str
    form: str
    config: Mapping[str, Any]
    mode: str
    tolerance: Tolerance
    counts: Mapping[str, int | None]
    tensors: Mapping[str, Mapping[str, Tensor]]


def case_names(folder: Path) -> list[str]:
    """Every case of a folder: the stems of both kinds of files, so that no half is overlooked."""
    return sorted({p.stem for p in folder.iterdir() if p.suffix in (".json", ".safetensors")})


def read_case(folder: Path, name: str) -> CaseFiles:
    """Read and check one case.

    Raises:
        CaseError: A file, key or tensor is missing, superfluous or unknown.
    """
    paths = folder / f"{name}.json", folder / f"{name}.safetensors"
    for path in paths:
        if not path.is_file():
            raise CaseError(f"{name}: {path} is missing; a case is a .json and a .safetensors file")
    header = json.loads(paths[0].read_text(encoding="utf-8"))
    if missing := [key for key in _REQUIRED if key not in header]:
        raise CaseError(f"{name}: the JSON file lacks {', '.join(missing)}")
    if header["mode"] not in ("eval", "train"):
        raise CaseError(f"{name}: unknown mode {header['mode']!r}, expected 'eval' or 'train'")
    if "form" not in header["config"]:
        raise CaseError(f"{name}: config has no 'form'")
    tensors: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in _PREFIXES}
    for key, tensor in load_file(paths[1]).items():
        prefix, _, rest = key.partition("/")
        if prefix not in tensors or not rest:
            raise CaseError(f"{name}: tensor {key!r} has none of the prefixes {', '.join(_PREFIXES)}")
        tensors[prefix][rest] = tensor
    _check_names(name, "inputs", header["inputs"], tensors["input"])
    _check_names(name, "outputs", header["outputs"], tensors["output"])
    for key, entry in header["inputs"].items():
        if list(tensors["input"][key].shape) != entry["shape"]:
            raise CaseError(
                f"{name}: input {key!r} has shape {list(tensors['input'][key].shape)}, "
                f"the JSON file says {entry['shape']}"
            )
    return CaseFiles(
        name=name,
        system=header["system"],
        form=header["config"]["form"],
        config=header["config"],
        mode=header["mode"],
        tolerance=Tolerance(**header["tolerance"]),
        counts={key: header[key] for key in ("param_count", "trainable_count", "adapter_count")},
        tensors=tensors,
    )


def _check_names(case: str, what: str, declared: Mapping[str, Any], held: Mapping[str, Tensor]) -> None:
    if different := sorted(declared.keys() ^ held.keys()):
        raise CaseError(f"{case}: {what} of the JSON file and of the tensors differ in {', '.join(different)}")
