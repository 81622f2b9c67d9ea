"""Adapter folders of HF peft: LoRA (rsLoRA, DoRA), LoKr, LoHa and (IA)^3, read and written without peft.

A folder holds ``adapter_config.json`` with a ``peft_type``, and ``adapter_model.safetensors``, whose names are module
paths behind ``base_model.model.``. Which modules are adapted is what the tensors say; targets and patterns of the
configuration only give ranks and scales.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import write_files
from ..core.adapter import Adapter, activate, active, attach, detach, registry_of
from ..core.anatomy import Anatomy
from ..core.checkpoint import CONFIG, WEIGHTS, read_json, read_tensors
from ..core.head import HEAD_SLOT
from ..core.probe import Example
from ..core.twins import original_names, wrapped_in
from ..errors import GraftError, nearest
from .peft_type import Layer, PeftType
from .peft_types import TYPES, reason_against

PREFIX = "base_model.model."
"""What stands in front of every name in a file of peft."""


def read_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    example: Example | None = None,
) -> Adapter:
    """Attach the adapter in a folder of HF peft to ``model`` and make it active.

    Modules are found by their path, by their path inside the backbone, or by canonical address; when none of the
    file's modules is there, without the first parts of their names, as for a wrapper that this model does not have.
    A classifier among ``modules_to_save`` becomes the adapter's own head.

    Args:
        model: The backbone it was trained on. peft keeps no fingerprint, so whether its weights are the same is not
            checked.
        folder: What peft's ``save_pretrained`` wrote.
        name: Name on this model; default: ``"default"``.
        example: Input ``(args, kwargs)`` of the dry run, for models whose input cannot be guessed.

    Raises:
        GraftError: Missing or damaged files, a type or an option that is not supported, modules that the model lacks
            or whose shapes differ; the model is unchanged then.
    """
    where = Path(folder)
    kind = _type_of(read_json(where / CONFIG), where)
    layers, rest = _grouped(read_tensors(where), kind, where)
    anatomy = Anatomy(model, example=example)
    paths = _located(anatomy, [*layers], where)
    here = {paths[name]: layer for name, layer in layers.items()}
    for path in here:
        reason = reason_against(type(kind), anatomy.module(path), writing=False)
        if reason:
            raise GraftError(f"{where}: the adapter of {path!r} cannot be read: {reason}")
    method = kind.method(here, anatomy)
    head = _head_of(anatomy, rest, where)
    classes = head["weight"].shape[0] if head else None
    headless, was_active = anatomy.head is None, active(model)
    adapter = attach(
        model,
        method,
        name=name or "default",
        num_classes=None if headless else classes,
        include=[anatomy.address(path) for path in here],
        example=example,
        _headless=headless,
    )
    try:
        placed = {p.home: p for _, p in adapter.placements if p.slot != HEAD_SLOT}
        for path, layer in here.items():
            kind.load(placed[path], layer)
        if head and adapter.head is not None:
            _load_head(adapter.head, head, where)
        elif head:
            adapter.parked = {f"{HEAD_SLOT}.{n}": t for n, t in head.items()}
            adapter.num_classes = classes
    except Exception:
        detach(model, adapter.name)
        activate(model, was_active)
        raise
    return adapter


def write_peft(adapter: Adapter, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write an adapter of LoRA, LoKr, LoHa or (IA)^3 as a folder that HF peft 0.21 loads.

    Rows of a fused layer, which peft has no word for, are written as a change of the whole layer: LoRA with the sum
    of their ranks, (IA)^3 with ones for the other rows. The adapter's head is written as ``modules_to_save``; for peft
    the model must then be built with that number of classes.

    Args:
        adapter: The adapter.
        folder: Created when missing.
        dtype: For the tensors; None: as they are.

    Raises:
        GraftError: The method, or what it does at some layer, has no counterpart in peft.
    """
    merged = registry_of(adapter.model).merged
    if merged is not None:
        raise GraftError(f"adapter {merged.name!r} is merged into the weights; unmerge first")
    kind = next((t() for t in TYPES.values() if t.ours is type(adapter.method)), None)
    if kind is None:
        known = ", ".join(t.ours.name for t in TYPES.values())
        raise GraftError(
            f"{adapter.method.name} has no counterpart in peft; only {known} have; save it with format='torchgraft'"
        )
    if adapter.batchnorm != "frozen":
        raise GraftError(
            f"batchnorm={adapter.batchnorm!r}: peft's files hold no statistics of BatchNorm; "
            "save with format='torchgraft'"
        )
    anatomy = Anatomy(adapter.model, example=adapter.example)
    homes: dict[str, list[Any]] = {}
    for _, placement in adapter.placements:
        if placement.slot != HEAD_SLOT:
            homes.setdefault(placement.home, []).append(placement)
    tensors: dict[str, Tensor] = {}
    for path, placements in homes.items():
        _check_writable(kind, anatomy, path, placements)
        with torch.no_grad():
            tensors |= {f"{PREFIX}{path}.{n}": t for n, t in kind.dump(placements, path, anatomy).items()}
    config = {
        "peft_type": kind.name,
        "base_model_name_or_path": getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "target_modules": _targets(anatomy, [*homes]),
        **kind.written(adapter.method, homes),
    }
    if adapter.head is not None and anatomy.head is not None:
        config["modules_to_save"] = [anatomy.head]
        tensors |= _head_tensors(adapter.head, anatomy)
    ready = {n: t.detach().to(dtype or t.dtype).cpu().contiguous().clone() for n, t in tensors.items()}
    text = json.dumps(config, indent=2) + "\n"
    writers = {WEIGHTS: lambda path: _save(ready, path), CONFIG: lambda path: path.write_text(text, encoding="utf-8")}
    write_files(folder, writers)


# -- reading ---------------------------------------------------------------------------------------------


def _type_of(config: dict[str, Any], where: Path) -> PeftType:
    """The type of the adapter, with its options checked."""
    name = config.get("peft_type")
    if not isinstance(name, str) or name not in TYPES:
        raise GraftError(f"{where}: peft_type={name!r} is not supported; {nearest(str(name), TYPES)}")
    kind = TYPES[name](config, where)
    kind.check()
    return kind


def _grouped(tensors: Mapping[str, Tensor], kind: PeftType, where: Path) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The adapted layers by their names in the file, and the tensors that belong to none."""
    layers: dict[str, Layer] = {}
    rest: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        key = full.removeprefix(PREFIX)
        match = kind.tensors.fullmatch(key)
        if match is not None:
            name = match["module"].replace(".base_layer", "")
            layers.setdefault(name, Layer(name)).tensors[match["tensor"]] = tensor
        elif any(word in key for word in ("lora_", "lokr_", "hada_", "ia3_")):
            raise GraftError(f"{where}: the tensor {full!r} is no part of {kind.name} that is supported")
        else:
            rest[key] = tensor
    if not layers:
        raise GraftError(f"{where}: {WEIGHTS} holds no tensor of {kind.name}; expected names such as {PREFIX}...")
    return layers, rest


def _located(anatomy: Anatomy, names: Iterable[str], where: Path) -> dict[str, str]:
    """Name in the file -> path in this model."""
    listed = list(names)
    known = _known_names(anatomy)
    for dropped in range(max(n.count(".") for n in listed) + 1):
        shorter = {n: ".".join(n.split(".")[dropped:]) for n in listed}
        if all(s in known for s in shorter.values()):
            found = {n: known[s] for n, s in shorter.items()}
            if len(set(found.values())) == len(listed):
                return found
    missing = next((n for n in listed if n not in known), listed[0])
    raise GraftError(
        f"{where}: this {type(anatomy.model).__name__} has no module {missing!r} ({len(listed)} in the adapter); "
        f"{nearest(missing, known)}"
    )


def _known_names(anatomy: Anatomy) -> dict[str, str]:
    """Every name that a module of this model may have elsewhere -> its path; the plain path comes first."""
    known = {path: path for path in anatomy.modules}
    flattened = original_names(anatomy.model)
    for path in anatomy.modules:
        first, dot, rest = path.partition(".")
        for base in (anatomy.base, wrapped_in(anatomy.model)):
            if base and path.startswith(f"{base}."):
                known.setdefault(path.removeprefix(f"{base}."), path)
        if first in flattened:
            known.setdefault(flattened[first] + dot + rest, path)
        known.setdefault(anatomy.address(path), path)
    return known


def _head_of(anatomy: Anatomy, rest: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The classifier among the tensors of ``modules_to_save``: weight and bias; empty when there is none."""
    head: dict[str, Tensor] = {}
    known, state = _known_names(anatomy), anatomy.model.state_dict()
    for key, tensor in rest.items():
        module, _, leaf = key.rpartition(".")
        path = known.get(module)
        if leaf in ("weight", "bias") and (path == anatomy.head if anatomy.head else path is None and leaf not in head):
            head[leaf] = tensor
            continue
        held = None if path is None else state.get(f"{path}.{leaf}")
        if held is None or held.shape != tensor.shape or not torch.equal(held.cpu().to(tensor.dtype), tensor):
            raise GraftError(
                f"{where}: {key!r} (modules_to_save) is no classifier of this {type(anatomy.model).__name__}, and only "
                "a classifier can become the adapter's own; merge it into the backbone's weights with peft"
            )
    if head and "weight" not in head:
        raise GraftError(f"{where}: the saved classifier has no weight; restore the file from a copy")
    return head


def _load_head(head: nn.Module, saved: Mapping[str, Tensor], where: Path) -> None:
    own = dict(head.named_parameters())
    for name, parameter in own.items():
        value = saved.get(name)
        if value is None:
            value = torch.zeros_like(parameter)
        if value.numel() != parameter.numel():
            raise GraftError(
                f"{where}: the saved classifier's {name} has shape {tuple(value.shape)}, this model needs "
                f"{tuple(parameter.shape)}; it belongs to another backbone"
            )
        with torch.no_grad():
            parameter.copy_(value.view_as(parameter))


# -- writing ---------------------------------------------------------------------------------------------


def _check_writable(kind: PeftType, anatomy: Anatomy, path: str, placements: list[Any]) -> None:
    """Refuse what peft would compute otherwise."""
    reason = reason_against(type(kind), anatomy.module(path), writing=True)
    rows = next((p.rows for p in placements if p.rows is not None), None)
    if not reason and (anatomy.calls(path) == 0 or any(getattr(p, "through", None) for p in placements)):
        reason = "its parent reads its weight, so peft would never call the layer that it puts in its place"
    if not reason and rows is not None and not kind.joins_rows:
        reason = f"it changes the rows {rows.start} to {rows.stop} only, and peft a layer as a whole; use targets=qkv"
    if reason:
        raise GraftError(
            f"{path!r} cannot be written for peft: {reason}; save with format='torchgraft', or exclude the layer"
        )


def _targets(anatomy: Anatomy, paths: list[str]) -> list[str] | str:
    """Full paths; peft also takes what ends in one of them, so an expression where that would be another module."""
    shared = any(module.endswith(f".{path}") for path in paths for module in anatomy.modules)
    return "|".join(re.escape(p) for p in sorted(paths)) if shared else sorted(paths)


def _head_tensors(head: nn.Module, anatomy: Anatomy) -> dict[str, Tensor]:
    """The adapter's classifier under the name of the backbone's."""
    own = dict(head.named_parameters())
    path = str(anatomy.head)
    if anatomy.module(path)._parameters.get("bias") is None and "bias" in own:
        if own["bias"].any():
            raise GraftError(
                f"the classifier {path!r} has no bias and the adapter's head has one, so peft could not load it; "
                "save with format='torchgraft'"
            )
        del own["bias"]
    return {f"{PREFIX}{path}.{name}": p for name, p in own.items()}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
