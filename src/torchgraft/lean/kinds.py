"""Which lean layer stands in for which layer.

A lean layer relies on what the forward of the layer does, so a layer is taken by its forward: a subclass that
defines its own is left alone unless it is listed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import timm.layers as tl
from torch import nn

from ..swap import original_class
from . import layers as lean

_CONVS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    tl.Conv2dSame,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_STANDARDISED = (tl.StdConv2d, tl.StdConv2dSame, tl.ScaledStdConv2d, tl.ScaledStdConv2dSame)
_NORMS = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(tl.LayerNorm, tl.LayerNorm2d, tl.LayerNormFp32, tl.LayerNorm2dFp32),
    *(tl.RmsNorm, tl.RmsNorm2d, tl.SimpleNorm, tl.GroupNorm, tl.GroupNorm1),
)
_SMOOTH = (
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(tl.GELU, tl.GELUTanh, tl.QuickGELU, tl.Swish, tl.Mish, tl.HardSwish),
)
_TRANSFORMERS_SMOOTH = {
    "GELUActivation",
    "SiLUActivation",
    "QuickGELUActivation",
    "NewGELUActivation",
    "FastGELUActivation",
}

_OWN_PRODUCTS = re.compile(
    "Attention|Attn|SqueezeExcit|SEModule|SELayer|EffectiveSE|GlobalResponseNorm|Gat(e|ing)|Glu|GLU"
)

_SMOOTH_FORWARDS = {kind.forward for kind in _SMOOTH}

_BY_FORWARD: dict[Callable[..., Any], type] = {
    **{kind.forward: lean.LeanConv for kind in _CONVS},
    **{kind.forward: lean.LeanConvTransposed for kind in _TRANSPOSED},
    **{kind.forward: lean.LeanStdConv for kind in _STANDARDISED},
    **{kind.forward: lean.LeanLinear for kind in (nn.Linear, tl.Linear)},
    **{
        kind.forward: lean.LeanBatchNorm for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, tl.BatchNormAct2d)
    },
    **{kind.forward: lean.Elementwise for kind in (*_NORMS, *_SMOOTH)},
    nn.ReLU.forward: lean.LeanReLU,
    nn.Hardtanh.forward: lean.LeanHardtanh,
    nn.LeakyReLU.forward: lean.LeanLeakyReLU,
    nn.Hardsigmoid.forward: lean.LeanHardsigmoid,
    nn.Dropout.forward: lean.LeanDropout,
    nn.MaxPool2d.forward: lean.LeanMaxPool,
    nn.MaxPool3d.forward: lean.LeanMaxPool,
    **{kind.forward: lean.LeanAvgPool for kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, tl.AvgPool2dSame)},
    **{kind.forward: lean.LeanAvgPool for kind in (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)},
}
"""A layer's own forward -> the lean layer that understands it."""


def lean_layer(module: nn.Module) -> type | None:
    """The lean layer for ``module``; None where there is none."""
    own: Any = original_class(module)
    found = _BY_FORWARD.get(own.forward)
    if found is None and own.__module__.startswith("transformers.") and own.__name__ in _TRANSFORMERS_SMOOTH:
        return lean.Elementwise
    if found is lean.LeanHardtanh and not math.isfinite(module.min_val + module.max_val):  # type: ignore[operator]
        return None
    if found is lean.LeanLeakyReLU and module.negative_slope < 0:  # type: ignore[operator]
        return None
    return found


def is_smooth(module: nn.Module) -> bool:
    """Whether a module is an activation with a smooth derivative."""
    own: Any = original_class(module)
    return own.forward in _SMOOTH_FORWARDS or (
        own.__module__.startswith("transformers.") and own.__name__ in _TRANSFORMERS_SMOOTH
    )


def computes_by_itself(module: nn.Module) -> bool:
    """Whether a module multiplies activations by each other outside its children: attention, gates."""
    return bool(_OWN_PRODUCTS.search(original_class(module).__name__)) and any(True for _ in module.children())
