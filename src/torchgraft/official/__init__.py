"""Checkpoints of the methods' official code: one file per code base knows its key names.

adapter = torchgraft.load_official(model, torch.load("checkpoint.pth", weights_only=True), system="ssf")
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, activate, active, attach, detach
from ..errors import GraftError, nearest
from .assembly import BACKBONE, Assembly, OfficialError
from .base import Place, System, UnknownKeyError, is_derived, register_system, registered

__all__ = ["Place", "System", "UnknownKeyError", "load_official", "official_systems", "register_system"]

_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "module")


def official_systems() -> dict[str, type[System]]:
    """Every official code base whose checkpoints can be read, by name."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    return registered()


def load_official(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    system: str,
    name: str = "default",
    backbone: Literal["check", "load", "ignore"] = "check",
    **options: Any,
) -> Adapter:
    """Attach the adapter that a checkpoint of a method's official code holds, and make it active.

    Args:
        model: Our backbone (timm names), not yet adapted under ``name``.
        state_dict: The official state dict: of the adapter alone, or with the whole network. The usual wrappers
            (``{"state_dict": ...}``, a leading ``module.``) are taken off.
        system: Whose code wrote it; see :func:`official_systems`.
        name: The adapter's name on this model.
        backbone: What to do with the backbone's tensors in the checkpoint. ``"check"``: they must be those of
            ``model``; ``"load"``: copy them into it; ``"ignore"``: leave them.
        options: What the shapes do not tell, by the names of the method's options (``scale=10``).

    Raises:
        GraftError: Unknown system or key, a tensor that is missing or does not fit, another backbone; the model
            is unchanged then.
    """
    known = official_systems()
    if system not in known:
        raise GraftError(f"load_official: unknown system {system!r}; {nearest(system, known)}")
    if backbone not in ("check", "load", "ignore"):
        raise GraftError(f"load_official: backbone={backbone!r}; expected 'check', 'load' or 'ignore'")
    state = _plain(state_dict)
    official = known[system](model, **options)
    before, was_active = dict(model.state_dict(keep_vars=True)), active(model)
    classes = official.num_classes(state)
    adapter = attach(model, official.method(state), name=name, num_classes=classes)
    try:
        converted = Assembly(official, adapter, before).convert(state)
        own = {n: t for n, t in converted.items() if not n.startswith(f"{BACKBONE}.")}
        theirs = {n.removeprefix(f"{BACKBONE}."): t for n, t in converted.items() if n not in own}
        if missing := sorted(adapter.state_dict().keys() - own.keys() - _derived(adapter)):
            raise OfficialError(f"{system}: the state holds nothing for {missing[0]!r} ({len(missing)} tensors in all)")
        if backbone == "check":
            _check(system, before, theirs)
        adapter.load_state_dict({**adapter.state_dict(), **own})
    except Exception:
        detach(model, name)
        activate(model, was_active)
        raise
    if backbone == "load":
        with torch.no_grad():
            for key, tensor in theirs.items():
                before[key].copy_(tensor)
    return adapter


def _plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names, whatever it is wrapped in."""
    inner: Any = state
    while isinstance(inner, Mapping) and not any(isinstance(v, Tensor) for v in inner.values()):
        found = next((inner[w] for w in _WRAPPERS if isinstance(inner.get(w), Mapping)), None)
        if found is None:
            raise GraftError(
                f"load_official: the state holds no tensors; expected a state dict, got keys {_few(inner)}"
            )
        inner = found
    tensors = {k: v for k, v in inner.items() if isinstance(v, Tensor)}
    if all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors


def _few(state: Any) -> str:
    return ", ".join(repr(k) for k in list(state)[:5]) if isinstance(state, Mapping) else type(state).__name__


def _derived(adapter: Adapter) -> set[str]:
    return {n for n in adapter.state_dict() if is_derived(n)}


def _check(system: str, before: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for key, tensor in theirs.items():
        held = before[key].detach()
        if not torch.allclose(held.float(), tensor.to(held.device).float(), rtol=1e-4, atol=1e-6):
            raise OfficialError(
                f"{system}: the checkpoint's backbone is another one: {key!r} differs; create the model with the "
                "weights it was trained on, or pass backbone='load' (take its weights) or 'ignore'"
            )
