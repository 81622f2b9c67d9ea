"""Attention with its core exchanged: what stands between queries, keys, values and the heads' outputs.

Attention modules differ in how they make queries, keys and values (fused or separate layers, norms, rotary positions,
caches), in what they add to the scores (relative positions, masks, windows) and in what follows. All of that stays the
module's own. The step in between is one call in most of them: ``F.scaled_dot_product_attention`` in timm, the attention
interface of transformers. :func:`with_core` returns the module's own forward with another function in the place of that
call: the same code object over a copy of its globals, so nothing outside this copy changes. Two modules without such a
call are written out here: ``nn.MultiheadAttention`` and torchvision's ``ShiftedWindowAttention``.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GraftError
from ..swap import original_class
from .attend import Attend, Core, Fused, causal, columns
from .attention_forwards import multihead_attention, shifted_window_attention

_FUSED = "scaled_dot_product_attention"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_OTHERWISE = {
    "XCA": "attends over channels, not over tokens",
    "ChannelAttention": "attends over channels, not over tokens",
    "DiffAttention": "subtracts two softmaxes",
    "DifferentialAttention": "subtracts two softmaxes",
    "ShiftedWindowAttentionV2": "compares directions (cosine attention)",
}
"""Classes that call the function and mean something else by it, or are written so that no call can be exchanged."""
_HEADS_SECOND = ("MaskUnitAttention",)
"""Classes (and timm's NesT) that hold the heads at axis 1 of five, in front of the windows."""


def why_no_core(module: nn.Module) -> str | None:
    """Why no core can be exchanged in ``module``; None where one can."""
    cls: Any = original_class(module)
    if cls.__name__ in _OTHERWISE:
        return f"{cls.__name__} {_OTHERWISE[cls.__name__]}, which takes no further keys"
    if _written_out(cls) is not None:
        return None
    names = inspect.unwrap(cls.forward).__code__.co_names if hasattr(cls.forward, "__globals__") else ()
    if _FUSED not in names and _INTERFACE not in names:
        return f"{cls.__name__} calls no attention function whose keys could be extended; any softmax in it is its own"
    kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if _INTERFACE in names and kind not in (None, "eager", "sdpa"):
        return f"{cls.__name__} runs {kind}, which takes no mask by column; load it with attn_implementation='sdpa'"
    return None


def with_core(cls: type[nn.Module], core: Core) -> Callable[..., Any]:
    """The forward of ``cls`` as a function of the module and its arguments, with ``core`` as its attention step."""
    written = _written_out(cls)
    if written is not None:
        return functools.partial(written, core)
    own = inspect.unwrap(cls.forward)
    heads = 1 if cls.__name__ in _HEADS_SECOND or cls.__module__.endswith(".nest") else -3
    fused = functools.partial(_fused, core, heads)
    functional = _Instead(F, **{_FUSED: fused})
    layers = _Instead(nn, functional=functional)
    replaced = {id(F): functional, id(nn): layers, id(torch): _Instead(torch, nn=layers), id(getattr(F, _FUSED)): fused}
    names = {n: v for n, v in own.__globals__.items() if n in own.__code__.co_names}
    names = {n: _Interface(v, core) if n == _INTERFACE else replaced.get(id(v), v) for n, v in names.items()}
    scope = {**own.__globals__, **names}
    copied = types.FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    copied.__kwdefaults__ = own.__kwdefaults__
    return copied


class FusedPath:
    """A module as its forward sees it: one that prefers the fused function to code of its own."""

    fused_attn = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Instead:
    """A Python module with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


# -- F.scaled_dot_product_attention ---------------------------------------------------------------------


def _fused(
    core: Core,
    heads: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In the place of ``F.scaled_dot_product_attention``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"dropout_p": dropout_p, **({"enable_gqa": True} if enable_gqa else {})}
    return core(query, key, value, Fused(heads, attn_mask, is_causal, scale, options))


# -- transformers ---------------------------------------------------------------------------------------


class _Interface:
    """In the place of transformers' table of attention functions."""

    def __init__(self, table: Any, core: Core) -> None:
        self.table, self.core = table, core

    def get_interface(self, name: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
        """The named function around the core."""
        if name not in (None, "eager", "sdpa"):
            raise GraftError(f"key_value: attn_implementation={name!r} takes no mask by column; set 'sdpa' or 'eager'")
        return functools.partial(_called, self.core, self.table.get_interface(name, default), name == "sdpa")

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.get_interface(name, self.table[name])


class _Called(Attend):
    """The step as a call of a transformers attention function; keeps the attention weights of the first."""

    def __init__(self, function: Callable[..., Any], module: Any, mask: Tensor | None, options: dict[str, Any]) -> None:
        self.function, self.module, self.mask, self.options = function, module, mask, options
        self.causal = False
        self.weights: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: int = 0) -> Tensor:
        length, options = k.shape[-2] - extra, self.options
        mask = causal(q, length) if self.causal else self.mask
        mask = None if mask is None else columns(mask, length, extra)
        bias = options.get("position_bias")
        if bias is not None:  # relative positions (T5): the extra keys have none
            options = {**options, "position_bias": columns(bias, length, extra)}
        heads, weights = self.function(self.module, q, k, v, mask, **options)
        self.weights = weights if self.weights is None else self.weights
        return heads.transpose(1, 2)


def _called(
    core: Core,
    function: Callable[..., Any],
    fused: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """In the place of a transformers attention function."""
    attend = _Called(function, module, attention_mask, options)
    scale = options.get("scaling")
    attend.scale = query.shape[-1] ** -0.5 if scale is None else scale
    asked = options.get("is_causal")
    asked = getattr(module, "is_causal", True) if asked is None else asked
    # As its fused function does: no mask and more than one query mean causal where the module says so.
    attend.causal = bool(fused and attention_mask is None and query.shape[2] > 1 and asked)
    return core(query, key, value, attend).transpose(1, 2), attend.weights


def _written_out(cls: type) -> Callable[..., Any] | None:
    """The function for a class whose forward is written out here, unless a subclass has its own."""
    if getattr(cls, "forward", None) is nn.MultiheadAttention.forward:
        return multihead_attention
    if cls.__name__ == "ShiftedWindowAttention" and cls.__module__ == "torchvision.models.swin_transformer":
        return shifted_window_attention
    return None
