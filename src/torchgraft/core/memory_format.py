"""Memory format: whether channels-last pays for a model, from its structure.

Convolutions of maps are faster with the channels last, everything else is about as fast. So what decides is where a
model computes: one that spends a good part of its operations on convolutions of (N, C, H, W) maps gains, one whose
blocks are linear layers over tokens or over channels-last maps does not. Measurements: docs/decisions/0008.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from .blocks import inner_modules
from .layers import is_conv
from .probe import Example, Trace, dry_run

_LEAST_SHARE = 0.25
"""Share of the operations of convolutions and linear layers that convolutions of maps must have. Small MaxViTs (0.33)
gain a fifth; a ConvNeXt-T (0.07), whose blocks are linear layers, gains nothing."""


def prefers_channels_last(model: nn.Module, *, example: Example | None = None) -> bool:
    """Whether ``model.to(memory_format=torch.channels_last)`` can be expected to make training faster.

    Args:
        model: Any module, adapted or not.
        example: Input ``(args, kwargs)`` of the dry run, for models whose input cannot be guessed.

    Returns:
        True where at least a quarter of the operations are convolutions of 2-D maps; False elsewhere, and where the
        model accepts no guess.
    """
    trace = dry_run(model, example)
    return trace is not None and map_share(model, trace) >= _LEAST_SHARE


def map_share(model: nn.Module, trace: Trace) -> float:
    """The share that convolutions of (N, C, H, W) maps have in the operations of convolutions and linear layers.

    Args:
        model: The model.
        trace: The record of a dry run of it.
    """
    maps = total = 0
    for path, module in inner_modules(model):
        call = trace.calls.get(path)
        if call is None or call.input is None or call.output is None:
            continue
        if is_conv(module):
            # The kernel slides over the values of its output, a transposed one over those of its input.
            places = call.input if module.transposed else call.output
            kernel: Tensor = module._parameters["weight"]  # type: ignore[assignment]
            count = call.count * math.prod(places) * kernel[0].numel()
            maps += count if len(call.output) == 4 else 0
        elif isinstance(module, nn.Linear):
            count = call.count * math.prod(call.output) * module.in_features
        else:
            continue
        total += count
    return maps / total if total else 0.0
