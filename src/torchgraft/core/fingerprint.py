"""The fingerprint of a backbone: which architecture and which weights an adapter was trained on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from ..errors import GraftError
from ..swap import original_class
from .anatomy import Anatomy

_ROUNDED = "_torchgraft_rounded"
"""Where a model remembers which hashes its rounded weights had in full precision."""


def fingerprint(anatomy: Anatomy) -> dict[str, Any]:
    """What identifies the backbone, as plain data.

    The weights are hashed in parts (stem and one part per stage or block), by canonical address, so that a
    feature extractor which lacks the last part or the classifier still has the parts it shares. Classifier
    and final norm are left out: other tasks replace them.

    Returns:
        ``architecture`` (timm's name where there is one, else the class), ``class``, ``parameters`` (count in
        the hashed parts), ``parts`` (part -> SHA-256 of its parameters and running statistics), and, where
        the model tells, ``tag``, ``weights``, ``input_size``, ``mean`` and ``std``.
    """
    model = anatomy.model
    rounded_from: dict[str, str] = model.__dict__.get(_ROUNDED, {})
    parts: dict[str, Any] = {}
    count = 0
    for path, name, tensor in _tensors(anatomy):
        address = anatomy.address(path)
        part = _part_of(address, anatomy)
        if part is None:
            continue
        digest = parts.setdefault(part, hashlib.sha256())
        digest.update(f"{address}.{name}{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
        count += tensor.numel()
    config = getattr(model, "pretrained_cfg", None) or getattr(getattr(model, "model", None), "pretrained_cfg", None)
    config = config if isinstance(config, dict) else {}
    found: dict[str, Any] = {
        "architecture": architecture(model),
        "class": original_class(model).__name__,
        "parameters": count,
        "parts": {name: rounded_from.get(h := digest.hexdigest()[:32], h) for name, digest in parts.items()},
    }
    for key in ("tag", "input_size", "mean", "std"):
        if config.get(key):
            found[key] = list(config[key]) if isinstance(config[key], (tuple, list)) else config[key]
    weights = getattr(model, "torchgraft_weights", None)
    if weights:
        found["weights"] = str(weights)
    return found


def remember_rounding(anatomy: Anatomy, before: dict[str, Any]) -> None:
    """Let the model, whose weights were cast to another type, be taken for the one that it was.

    It is by their values that the rounded weights are known; other weights in the same model are other weights.

    Args:
        anatomy: The anatomy of the model as it is now.
        before: Its fingerprint ahead of the cast.
    """
    now = fingerprint(anatomy)["parts"]
    anatomy.model.__dict__.setdefault(_ROUNDED, {}).update({now[part]: before["parts"][part] for part in now})


def architecture(model: nn.Module) -> str:
    """The architecture's name: timm's, else the transformers model type, else the class."""
    for owner in (model, getattr(model, "model", None)):
        config = getattr(owner, "pretrained_cfg", None)
        if isinstance(config, dict) and config.get("architecture"):
            return str(config["architecture"])
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return str(kind) if kind else original_class(model).__name__


def check_fingerprint(found: dict[str, Any], wanted: dict[str, Any], *, strict: bool = True) -> None:
    """Raise unless an adapter of backbone ``wanted`` fits backbone ``found``.

    Args:
        found: Fingerprint of the model at hand.
        wanted: Fingerprint stored with the adapter.
        strict: Refuse other weights of the same architecture too.

    Raises:
        GraftError: Names both backbones, or the part whose weights differ.
    """
    if found["architecture"] != wanted["architecture"] and not _same_shapes(found, wanted):
        raise GraftError(
            f"this adapter was trained on {wanted['architecture']!r}, the model here is "
            f"{found['architecture']!r}; load it into a {wanted['architecture']!r}"
        )
    if not strict:
        return
    shared = [part for part in wanted["parts"] if part in found["parts"]]
    differing = [part for part in shared if wanted["parts"][part] != found["parts"][part]]
    if differing or not shared:
        where = f"the weights of {differing[0]} differ" if differing else "no part of the model matches"
        source = f" (trained on {wanted['weights']})" if wanted.get("weights") else ""
        raise GraftError(
            f"this adapter was trained on other weights of {wanted['architecture']!r}: {where}{source}; load the "
            "weights it was trained on, or pass strict=False to use it all the same"
        )


def _same_shapes(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """The same network under two names: every shared part has the very same weights."""
    shared = [p for p in wanted["parts"] if p in found["parts"]]
    return bool(shared) and all(found["parts"][p] == wanted["parts"][p] for p in shared)


def _tensors(anatomy: Anatomy) -> list[tuple[str, str, torch.Tensor]]:
    listed = []
    for path in sorted(["", *anatomy.modules], key=anatomy.address):
        module = anatomy.module(path)
        buffers = module._non_persistent_buffers_set
        own = {**module._parameters, **{n: b for n, b in module._buffers.items() if n not in buffers}}
        for name, tensor in sorted(own.items()):
            if tensor is not None and tensor.is_floating_point():
                listed.append((path, name, tensor))
    return listed


def _part_of(address: str, anatomy: Anatomy) -> str | None:
    first = address.partition(".")[0]
    if first.startswith(("stages[", "blocks[")):
        return first
    if anatomy.blocks:
        return "stem" if anatomy.stem is not None and address == anatomy.address(anatomy.stem) else None
    head = anatomy.head
    inside_head = head is not None and address.startswith(anatomy.address(head))
    return None if inside_head else "all"


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.device.type == "meta":
        return b"meta"
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()
