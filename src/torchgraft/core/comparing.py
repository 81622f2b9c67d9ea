"""Comparing a model, or one of its layers, with itself: probes, what is seen on the way, and errors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .graft import first_output
from .probe import Example, leading_tensor


def watch(
    model: nn.Module, homes: dict[str, nn.Module], example: Example | None
) -> tuple[Tensor | None, dict[str, Example]]:
    """The model's output for the probe, and what the modules at ``homes`` were first called with."""
    if example is None:
        return None, {}
    seen: dict[str, Example] = {}

    def keep(path: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in seen:
                seen[path] = tuple(_kept(a) for a in args), {k: _kept(v) for k, v in kwargs.items()}

        return look

    with contextlib.ExitStack() as stack:
        for path, module in homes.items():
            if path:
                stack.enter_context(module.register_forward_pre_hook(keep(path), with_kwargs=True))
        out = model(*example[0], **example[1])
    return leading_tensor(out), seen


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def output_for(module: nn.Module, inputs: Example) -> Tensor:
    """What a module returns for what :func:`watch` saw it called with."""
    args, kwargs = inputs
    return first_output(module(*map(_kept, args), **{k: _kept(v) for k, v in kwargs.items()})).clone()


def default_probe(probe: Example | Tensor | None, anatomy: Anatomy) -> Example | None:
    """The probe that is given, or random values of the shape of the dry run; None where there was none."""
    if isinstance(probe, Tensor):
        return (probe,), {}
    if probe is not None or anatomy.trace is None:
        return probe
    generator = torch.Generator().manual_seed(0)

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    args, kwargs = anatomy.trace.example
    return tuple(fresh(a) for a in args), {k: fresh(v) for k, v in kwargs.items()}


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference between two tensors, relative to the largest value of the second."""
    if not a.numel():
        return 0.0
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))


def is_low(out: Tensor | None) -> bool:
    """Whether a tensor has less precision than float32."""
    return out is not None and out.dtype not in (torch.float32, torch.float64)
