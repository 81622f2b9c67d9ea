"""A user's own weights: reading a checkpoint file safely and fitting it to a model.

The classifier may differ, because an adapter brings its own: it is left as it was initialised, with a
warning. Any other difference is an error that names the keys.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import GraftError
from .assets import file_digest
from .provenance import data_config_of
from .timm_api import WRAPPERS

_PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors, .pt, .pth or .bin file without running any code in it.

    A dict under one of :data:`.timm_api.WRAPPERS` is taken out of its wrapper, and the prefixes that
    ``DistributedDataParallel`` and ``torch.compile`` add to the names are removed.

    Raises:
        GraftError: There is no such file, it is damaged, or it holds something else than tensors.
    """
    if not path.is_file():
        raise GraftError(f"there is no weights file {path}")
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise GraftError(f"cannot read weights from {path}: expected a .safetensors, .pt, .pth or .bin file")
    try:
        if suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise GraftError(f"cannot read weights from {path}: the file is damaged ({_line(error)})") from error
    except Exception as error:
        raise GraftError(
            f"cannot read weights from {path}: it holds more than tensors, which is not loaded because that "
            "could run code; save model.state_dict() or a .safetensors file instead"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise GraftError(f"{path} holds no tensors under names; expected a state dict, as model.state_dict() gives")
    return {_without_prefixes(name): value for name, value in tensors.items()}


def fit_weights(state: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Make ``state`` loadable into ``model`` with ``strict=True``.

    Args:
        state: Names and tensors from a file.
        model: The model as it was built; its classifier fills in for one that does not fit.
        source: What to call the weights in messages.

    Returns:
        A tensor for every name of the model.

    Raises:
        GraftError: Names or shapes outside the classifier differ.
    """
    target = model.state_dict()
    heads = classifier_names(model)
    fitted = _replace_classifier(state, target, heads)
    if state_difference(fitted, target):
        fitted = _replace_classifier(converted(state, model), target, heads)
    problem = state_difference(fitted, target)
    if problem:
        raise GraftError(f"{source} does not fit {type(model).__name__}: {problem}")
    dropped = sorted(
        n for n in {*state, *target} if _belongs(n, heads) and (n not in fitted or fitted[n] is target.get(n))
    )
    if dropped:
        warnings.warn(
            f"{source}: the classifier ({', '.join(dropped)}) does not fit this model and was left out",
            stacklevel=3,
        )
    return fitted


def converted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` under the names and sizes of ``model``, by the conversion of the model's own file, where it has one.

    That is what knows official key names, older key styles and position embeddings of another size.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        # A conversion that stumbles was not meant for this file; comparing names and shapes says what is wrong.
        with contextlib.suppress(KeyError, RuntimeError, ValueError, AttributeError, IndexError):
            return dict(convert(dict(state), model))
    return dict(state)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Module names of a model's classifiers, as its ``pretrained_cfg`` says."""
    named = data_config_of(model).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def file_origin(path: Path) -> str:
    """How a backbone says that its weights came from a file: ``file:sha256:...``."""
    return f"file:sha256:{file_digest(path)}"


def _replace_classifier(
    state: dict[str, Tensor], target: dict[str, Tensor], heads: tuple[str, ...]
) -> dict[str, Tensor]:
    """``state`` with every classifier that does not fit exchanged for the model's own."""
    fitted = dict(state)
    for head in heads:
        names = {n for n in (*state, *target) if _belongs(n, (head,))}
        fits = all(n in state and n in target and state[n].shape == target[n].shape for n in names)
        if not fits:
            for n in names:
                fitted.pop(n, None)
                if n in target:
                    fitted[n] = target[n]
    return fitted


def _belongs(name: str, heads: tuple[str, ...]) -> bool:
    return any(name == head or name.startswith(head + ".") for head in heads)


def state_difference(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    """What keeps ``state`` from being loaded as ``target``, in words; empty when nothing does."""
    missing = [n for n in target if n not in state]
    unexpected = [n for n in state if n not in target]
    shapes = [
        f"{n} {tuple(state[n].shape)} instead of {tuple(target[n].shape)}"
        for n in target
        if n in state and state[n].shape != target[n].shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in found if names)


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _without_prefixes(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
