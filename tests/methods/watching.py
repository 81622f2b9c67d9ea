"""Looking into networks of the tests: what a module is given and returns, and weights that are no start."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def record(model: nn.Module, path: str, side: Literal["input", "output"]) -> list[Tensor]:
    """A list to which every call of the module adds the first tensor that it is given or returns."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        values = (*args, *kwargs.values()) if side == "input" else (out,) if isinstance(out, Tensor) else out
        seen.append(next(v for v in values if isinstance(v, Tensor)).detach().clone())

    model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    return seen


def spread(module: M, std: float = 0.3) -> M:
    """Random values for every parameter, so that nothing is zero or the identity; returns the module."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module
