"""``torchgraft inspect``: what is inside an adapter folder, without loading a backbone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .console import emit_json, next_command, pairs, results_only, say, table
from .options import AdapterDir, AsJson

EXAMPLES = """\
torchgraft inspect runs/pets/adapter
torchgraft inspect runs/pets/adapter --json"""


def run(
    adapter: AdapterDir,
    as_json: AsJson = False,
) -> None:
    """Show what is inside a saved adapter.

    Method, sites, tensors, size on disk, backbone and classes; no backbone is loaded.
    """
    with results_only(as_json):
        facts = _facts(adapter)
    if as_json:
        emit_json(facts)
        return
    from torchgraft.tasks.quantities import size

    backbone = facts["backbone"]
    classes = (facts["task"] or {}).get("classes")
    pairs(
        [
            ("adapter", facts["folder"]),
            ("method", facts["method"]),
            *((f"  {name}", value) for name, value in facts["method_config"].items()),
            ("backbone", backbone["architecture"]),
            *((f"  {name}", _flat(value)) for name, value in backbone.items() if name != "architecture"),
            ("classes", ", ".join(map(str, classes)) if classes else facts["num_classes"]),
            ("parameters", f"{facts['parameters']:,} in {len(facts['tensors'])} tensors"),
            ("on disk", size(facts["bytes"])),
            ("sites", len(facts["sites"])),
            ("written by", f"torchgraft {facts['torchgraft_version']}"),
        ]
    )
    say()
    table(
        ("tensor", "shape", "dtype", "values"),
        [(t["name"], "x".join(map(str, t["shape"])), t["dtype"], f"{t['values']:,}") for t in facts["tensors"]],
        right=("values",),
    )
    next_command("Use it:", f"torchgraft predict {adapter} IMAGE...", f"torchgraft eval {adapter} DATA")


def _facts(folder: Path) -> dict[str, Any]:
    import torchgraft as tg
    from torchgraft.errors import GraftError

    config = tg.read_config(folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise GraftError(f"{folder} has no adapter_model.safetensors; give a folder that adapter.save wrote")
    tensors = _tensors(weights)
    return {
        "folder": str(folder),
        **config,
        "parameters": sum(t["values"] for t in tensors),
        "tensors": tensors,
        "bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        "task": tg.read_task(folder),
    }


def _tensors(path: Path) -> list[dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    from torchgraft.errors import GraftError

    rows = []
    try:
        with safe_open(path, framework="numpy") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape = list(part.get_shape())
                rows.append({"name": name, "shape": shape, "dtype": part.get_dtype(), "values": math.prod(shape)})
    except SafetensorError as error:
        raise GraftError(f"{path} is damaged or incomplete ({error}); copy the adapter again") from None
    return rows


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return f"{len(value)}, each with its hash: {', '.join(value)}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
