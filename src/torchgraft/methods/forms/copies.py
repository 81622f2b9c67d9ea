"""The adapter's own copies of existing parameters, chosen by the module that holds them and by their name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...core.anatomy import Anatomy
from ...core.placements import Train

Choice = Callable[[str, nn.Module, str], bool]
"""``(path of the module, the module, name of its parameter) -> whether the adapter gets a copy``."""


def copies(anatomy: Anatomy, choose: Choice) -> list[Train]:
    """One :class:`~torchgraft.core.placements.Train` per module of the selection that holds a chosen parameter.

    The model itself counts as a module (it holds class tokens and position embeddings). A parameter that
    several modules share keeps one copy that they share too. Integer parameters of quantised layers cannot be
    trained and are left out, and so is a part of the model that never runs (an auxiliary classifier).
    """
    placed: list[Train] = []
    shared: dict[int, nn.Parameter] = {}
    for path, module in {"": anatomy.model, **anatomy.modules}.items():
        if not anatomy.selection(path, anatomy.address(path)) or _is_idle(anatomy, path):
            continue
        chosen = {
            name: p
            for name, p in module._parameters.items()
            if p is not None and p.is_floating_point() and choose(path, module, name) and _is_read(anatomy, p)
        }
        if chosen:
            train = Train(path, dict(chosen))
            for name, original in chosen.items():
                copy = shared.setdefault(id(original), train.get_parameter(f"own_{name}"))
                train.register_parameter(f"own_{name}", copy)
            placed.append(train)
    return placed


def _is_read(anatomy: Anatomy, parameter: nn.Parameter) -> bool:
    """Whether the forward uses the parameter at all; training would never change one that it does not."""
    return anatomy.trace is None or anatomy.trace.reads(parameter)


def _is_idle(anatomy: Anatomy, path: str) -> bool:
    """Whether neither the module nor the one that holds it was called in the dry run.

    A module whose holder was called may still be read by it (``nn.MultiheadAttention.out_proj``), and a list
    is never called itself, so there what holds the list counts.
    """
    if anatomy.trace is None or not path or anatomy.trace.fired(path):
        return False
    holder = path.rpartition(".")[0]
    while holder and isinstance(anatomy.module(holder), (nn.ModuleList, nn.ModuleDict)):
        holder = holder.rpartition(".")[0]
    return not anatomy.trace.fired(holder)
