"""Rehearsal: whether a model runs with a placement in it, before the placement is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.anatomy import Anatomy
from ...core.placements import Placement
from ...core.probe import in_eval_mode, leading_tensor


def rehearse(anatomy: Anatomy, placement: Placement) -> str | None:
    """What is wrong when the model runs with ``placement`` in it; None where it runs as it should.

    The dry run is done once more, with the placement's actions as hooks that are gone when this returns, and must
    return a tensor of the same shape. Actions around a module cannot be rehearsed.

    Args:
        anatomy: The model, with its dry run.
        placement: What acts; on the model's device.
    """
    if anatomy.trace is None:
        return None
    handles = []
    for hook in placement.hooks():
        module, act = anatomy.module(hook.path), hook.action
        if hook.when == "before":
            handles.append(module.register_forward_pre_hook(_before(act), with_kwargs=True))
        elif hook.when == "after":
            handles.append(module.register_forward_hook(_after(act), with_kwargs=True))
    args, kwargs = anatomy.trace.example
    try:
        with in_eval_mode(anatomy.model), torch.no_grad():
            out = leading_tensor(anatomy.model(*args, **kwargs))
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    finally:
        for handle in handles:
            handle.remove()
    plain = anatomy.shapes("")[1]
    found = None if out is None else tuple(out.shape)
    return None if found == plain else f"it returns {found} in place of {plain}"


def _before(action: Any) -> Any:
    def act(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return action.before(args, kwargs)

    return act


def _after(action: Any) -> Any:
    def act(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        return action.after(args, kwargs, out)

    return act
