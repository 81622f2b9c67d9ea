"""The step of attention from queries, keys and values to the heads' outputs, with longer keys than the mask knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend:
    """The module's own attention step: ``softmax(scale q k^T + mask) v``, with the mask that the module made.

    Attributes:
        scale: Factor of the scores.
        heads: Axis of the heads in q, k and v.
    """

    scale: float
    heads: int = -3

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: int = 0) -> Tensor:
        """The heads' outputs; every query sees the first ``extra`` keys, whatever the mask says."""
        raise TypeError(f"{type(self).__name__} defines no step")


class Fused(Attend):
    """The step as a call of ``F.scaled_dot_product_attention``."""

    def __init__(self, heads: int, mask: Tensor | None, causal: bool, scale: float, options: dict[str, Any]) -> None:
        self.heads, self.mask, self.causal, self.scale, self.options = heads, mask, causal, scale, options

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: int = 0) -> Tensor:
        """One call of the fused function."""
        length = k.shape[-2] - extra
        mask = causal(q, length) if self.causal else self.mask
        mask = None if mask is None else columns(mask, length, extra)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, **self.options)


class Plain(Attend):
    """The step in plain operations, for callers who want the attention weights (of the first call)."""

    def __init__(self, mask: Tensor | None, scale: float, dropout: float) -> None:
        self.mask, self.scale, self.dropout = mask, scale, dropout
        self.weights: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: int = 0) -> Tensor:
        """Scores, softmax, values."""
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if self.mask is not None:
            scores = scores + columns(self.mask, k.shape[-2] - extra, extra)
        weights = F.dropout(scores.softmax(-1), self.dropout)
        self.weights = weights if self.weights is None else self.weights
        return weights @ v


Core = Callable[[Tensor, Tensor, Tensor, Attend], Tensor]
"""``(q, k, v, attend) -> heads``, with q, k, v of shape (..., H, N or S, e) and heads (..., H, N, e_v)."""


def causal(q: Tensor, length: int) -> Tensor:
    """True where query i may see key j: j <= i."""
    return torch.ones(q.shape[-2], length, dtype=torch.bool, device=q.device).tril()


def columns(mask: Tensor, length: int, extra: int) -> Tensor:
    """The mask (or bias) of the last ``length`` keys behind ``extra`` columns that hide nothing and add nothing."""
    if not extra:
        return mask
    mask = mask[..., :length] if mask.shape[-1] != 1 else mask.expand(*mask.shape[:-1], length)
    return F.pad(mask, (extra, 0), value=True if mask.dtype == torch.bool else 0.0)
