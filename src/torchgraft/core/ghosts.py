"""Ghosts: copies of a model and its input that hold no data, to count with in a moment and without memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .probe import Example

Make = Callable[[Tensor], Tensor]


def without_data(model: nn.Module, example: Example, make: Make) -> tuple[nn.Module, Example]:
    """A copy of the model and of its input with every tensor replaced by what ``make`` makes of it."""
    args, kwargs = tree_map_only(Tensor, make, example)
    return copied(model, make), (args, kwargs)


def copied(model: nn.Module, make: Make) -> nn.Module:
    """A copy whose parameters and buffers are what ``make`` makes of the model's."""
    memo: dict[int, Any] = {id(p): nn.Parameter(make(p.detach()), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): make(b) for b in model.buffers()})


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same layout on the meta device."""
    return _empty(tensor, "meta")


def fake_on_cpu(mode: FakeTensorMode) -> Make:
    """Makes fake tensors, which say that they are on the CPU: the kernels, and what they keep, are those of the CPU."""

    def make(tensor: Tensor) -> Tensor:
        with mode:
            return _empty(tensor, "cpu")

    return make


def _empty(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
