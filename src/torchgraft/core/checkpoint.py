"""Adapter folders: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``, ``task.json``.

Loading never unpickles and never imports code that a file names; every field is checked before it is used.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import write_files
from ..errors import GraftError, nearest
from ..version import VERSION
from .adapter import Adapter, activate, active, attach, detach, registry_of, shape_mismatch
from .address import Selection
from .anatomy import Anatomy
from .build import build, saved_prefix
from .card import model_card
from .fingerprint import check_fingerprint, fingerprint
from .head import HEAD_SLOT
from .method import Method, method_class
from .probe import Example

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TASK = "task.json"
FORMAT = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "torchgraft_version": (str,),
    "name": (str,),
    "method": (str,),
    "method_config": (dict,),
    "num_classes": (int, type(None)),
    "batchnorm": (str,),
    "include": (list, type(None)),
    "exclude": (list, type(None)),
    "sites": (list,),
    "parameters": (int,),
    "backbone": (dict,),
}


def save(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    task: dict[str, Any] | None = None,
    format: Literal["torchgraft", "peft"] = "torchgraft",
) -> None:
    """Write an adapter to a folder; files that are there are replaced only when all new ones are complete.

    Args:
        adapter: What :func:`torchgraft.attach` returned.
        folder: Created when missing.
        dtype: ``"fp32"``, ``"fp16"``, ``"bf16"`` or the torch dtype for floating-point tensors; None: as they
            are.
        task: Plain data about the task (classes, transforms, metrics) for ``task.json``.
        format: ``"torchgraft"``, or ``"peft"`` for a folder that HF peft loads; see
            :func:`torchgraft.interop.write_peft`.

    Raises:
        GraftError: Unknown dtype or format, or the folder cannot be written.
    """
    target = _dtype(dtype)
    if format == "peft":
        from ..interop import write_peft

        write_peft(adapter, folder, target)
        return
    if format != "torchgraft":
        raise GraftError(f"format={format!r}; {nearest(str(format), ('torchgraft', 'peft'))}")
    merged = registry_of(adapter.model).merged
    if merged is not None:
        raise GraftError(f"adapter {merged.name!r} is merged into the weights; unmerge first")
    anatomy = Anatomy(adapter.model, example=adapter.example)
    modules = [(p, anatomy.address(p)) for p in anatomy.modules]
    selection = Selection(adapter.include, adapter.exclude, [len(s.blocks) for s in anatomy.stages])
    include, exclude = selection.canonical(modules)
    tensors = {
        name: (t.to(target) if target is not None and t.is_floating_point() else t).cpu().contiguous().clone()
        for name, t in adapter.state_dict().items()
    }
    config = {
        "format": FORMAT,
        "torchgraft_version": VERSION,
        "name": adapter.name,
        "method": adapter.method.name,
        "method_config": adapter.method.to_dict(),
        "num_classes": adapter.num_classes,
        "batchnorm": adapter.batchnorm,
        "include": include,
        "exclude": exclude,
        "sites": [s.address for s in adapter.sites],
        "parameters": adapter.num_parameters(),
        "traced": anatomy.trace is not None,
        "backbone": fingerprint(anatomy),
    }
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS: lambda path: _save_tensors(tensors, path, config),
        CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
        "README.md": lambda path: path.write_text(model_card(adapter, config, task), encoding="utf-8"),
    }
    if task is not None:
        text = json.dumps(task, indent=2, default=str) + "\n"
        writers[TASK] = lambda path: path.write_text(text, encoding="utf-8")
    write_files(folder, writers)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    strict: bool = True,
    *,
    example: Example | None = None,
) -> Adapter:
    """Attach the adapter in ``folder`` to ``model`` and make it active.

    Args:
        model: The backbone it was trained on, or a twin of it (a feature extractor, a detector's trunk).
        folder: What :func:`save` wrote, or a folder of HF peft (:func:`torchgraft.interop.read_peft`).
        name: Name on this model; default: the one it was saved under.
        strict: Refuse a backbone whose weights differ, and sites that the model lacks.
        example: Input ``(args, kwargs)`` of the dry run, for models whose input cannot be guessed.

    Raises:
        GraftError: Missing, damaged or foreign files, or another backbone; the model is unchanged then.
    """
    if "peft_type" in read_json(Path(folder) / CONFIG):
        from ..interop import read_peft

        return read_peft(model, folder, name, example=example)
    config = read_config(folder)
    tensors = read_tensors(folder)
    anatomy = Anatomy(model, example=example)
    if anatomy.trace is None and config.get("traced", True):
        raise GraftError(
            f"{Path(folder)}: {type(model).__name__} accepts no guessed input, so the adapter's sites cannot be found; "
            "pass example=(args, kwargs), as when it was attached"
        )
    check_fingerprint(fingerprint(anatomy), config["backbone"], strict=strict)
    was_active = active(model)
    headless = anatomy.head is None
    options: dict[str, Any] = {
        "num_classes": None if headless else config["num_classes"],
        "include": config["include"],
        "exclude": config["exclude"],
        "batchnorm": config["batchnorm"],
        "example": example,
    }
    _check_sizes(anatomy, config, tensors, options, Path(folder))
    adapter = attach(model, _method_of(config), name=name or config["name"], _headless=headless, **options)
    try:
        own = adapter.state_dict()
        extra = [key for key in tensors if key not in own]
        lost = [k for k in extra if not (headless and not k.startswith(("stages[", "blocks[")))]
        if lost and strict:
            raise GraftError(
                f"{Path(folder)}: the adapter acts at {lost[0].rpartition('/')[0] or lost[0]!r} ({len(lost)} tensors "
                "in all), which this model lacks; load it into the model it was trained on, or pass strict=False"
            )
        adapter.parked = {key: tensors[key] for key in extra}
        if headless:
            adapter.num_classes = config["num_classes"]
        adapter.load_state_dict(tensors)
    except Exception:
        detach(model, adapter.name)
        activate(model, was_active)
        raise
    return adapter


def _check_sizes(
    whole: Anatomy, config: dict[str, Any], tensors: dict[str, Tensor], options: dict[str, Any], folder: Path
) -> None:
    """Refuse a config that asks for other sizes than the file holds, before any memory is taken for it."""
    anatomy = Anatomy(
        whole.model,
        include=options["include"],
        exclude=options["exclude"],
        example=options["example"],
        trace=whole.trace,
    )
    method, classes, batchnorm = _method_of(config), options["num_classes"], options["batchnorm"]
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            placed = build(anatomy, method, num_classes=classes, batchnorm=batchnorm, headless=whole.head is None)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise GraftError(
            f"{folder}: {config['method']} cannot be built with the shapes its configuration asks for "
            f"({str(error).splitlines()[0]})"
        ) from error
    for placement in placed:
        prefix = saved_prefix(anatomy, placement)
        for key, tensor in placement.owned().items():
            held = tensors.get(f"{prefix}.{key}")
            if held is not None and held.shape != tensor.shape:
                raise GraftError(f"{folder}: {shape_mismatch(f'{prefix}.{key}', held, tensor)}")
            if held is None and placement.slot == HEAD_SLOT:
                raise GraftError(f"{folder}: the file holds no head for num_classes={config['num_classes']}")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked content of ``adapter_config.json``.

    Raises:
        GraftError: No such folder or file, damaged JSON, a missing or wrong field, a newer format.
    """
    config = read_json(Path(folder) / CONFIG)
    where = Path(folder) / CONFIG
    for field, types in _FIELDS.items():
        if field not in config:
            raise GraftError(f"{where}: the field {field!r} is missing; this is no adapter of torchgraft")
        if not isinstance(config[field], types) or isinstance(config[field], bool):
            raise GraftError(f"{where}: {field}={config[field]!r} is not valid; expected {types[0].__name__}")
    if config["format"] < 1:
        raise GraftError(f"{where}: format {config['format']} is not valid; the first format is 1")
    if config["format"] > FORMAT:
        raise GraftError(
            f"{where}: format {config['format']} is newer than this torchgraft reads ({FORMAT}); upgrade it"
        )
    backbone = config["backbone"]
    if not isinstance(backbone.get("architecture"), str) or not isinstance(backbone.get("parts"), dict):
        raise GraftError(f"{where}: the backbone's fingerprint is damaged; expected 'architecture' and 'parts'")
    for field in ("include", "exclude", "sites"):
        if not all(isinstance(entry, str) for entry in config[field] or []):
            raise GraftError(f"{where}: {field} holds something else than addresses")
    _method_of(config)
    return config


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU.

    Raises:
        GraftError: The file is missing, truncated or no safetensors file.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise GraftError(f"{path} does not exist; an adapter folder holds {CONFIG} and {WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise GraftError(
            f"{path} is damaged ({str(error).splitlines()[0]}); restore it from a copy or train again"
        ) from error


def read_task(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The content of ``task.json``, None when the adapter was saved without a task.

    Raises:
        GraftError: The file is there but damaged.
    """
    path = Path(folder) / TASK
    return read_json(path) if path.exists() else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of an adapter folder.

    Raises:
        GraftError: No such folder or file, or no JSON object in it.
    """
    if not path.parent.is_dir():
        raise GraftError(f"{path.parent} is not a folder; expected an adapter folder with {CONFIG}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GraftError(f"{path} does not exist; an adapter folder holds {CONFIG} and {WEIGHTS}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise GraftError(f"{path} cannot be read as JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise GraftError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def _method_of(config: dict[str, Any]) -> Method:
    return method_class(config["method"]).from_dict(config["method_config"])


def _save_tensors(tensors: dict[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt", "torchgraft": config["torchgraft_version"]})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype in (*DTYPES.values(), torch.float64):
        return dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise GraftError(f"dtype={dtype!r}; {nearest(str(dtype), DTYPES)}")
    return DTYPES[str(dtype)]
