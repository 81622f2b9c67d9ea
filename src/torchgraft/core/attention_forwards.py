"""Attention modules without a call that could be exchanged, written out around a core."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attend import Core, Fused, Plain
from .shifted_windows import Windows


def multihead_attention(
    core: Core,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # a hint about attn_mask, which is given with it
) -> tuple[Tensor, Tensor | None]:
    """The forward of ``nn.MultiheadAttention``."""
    batched = query.dim() == 3
    given = [t if batched else t.unsqueeze(1) for t in (query, key, value)]
    given = [t if not batched or module.batch_first is False else t.transpose(0, 1) for t in given]
    q, k, v = (F.linear(t, w, b) for t, w, b in zip(given, *_projections(module), strict=True))  # (N or S, B, d)
    n, batch, width = q.shape
    added = [] if module.bias_k is None else [[t.expand(1, batch, -1) for t in (module.bias_k, module.bias_v)]]
    added += [[torch.zeros_like(k[:1]), torch.zeros_like(v[:1])]] if module.add_zero_attn else []
    for more_k, more_v in added:
        k, v = torch.cat([k, more_k]), torch.cat([v, more_v])
    q, k, v = (t.reshape(len(t), batch, module.num_heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
    mask = _merged_mask(attn_mask, key_padding_mask, q, len(added))
    dropout = module.dropout if module.training else 0.0
    scale = q.shape[-1] ** -0.5
    plain = Plain(mask, scale, dropout)
    attend = plain if need_weights else Fused(-3, mask, False, scale, {"dropout_p": dropout})
    out = core(q, k, v, attend).permute(2, 0, 1, 3).reshape(n, batch, width)
    out = F.linear(out, module.out_proj.weight, module.out_proj.bias)
    out = out.squeeze(1) if not batched else out.transpose(0, 1) if module.batch_first else out
    weights = plain.weights
    if weights is not None:
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    return out, weights


def _projections(module: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The weights and biases of q, k and v of an ``nn.MultiheadAttention``."""
    bias = module.in_proj_bias
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    if module.in_proj_weight is not None:
        return module.in_proj_weight.chunk(3), biases
    return (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight), biases


def _merged_mask(mask: Tensor | None, padding: Tensor | None, q: Tensor, added: int) -> Tensor | None:
    """One additive mask for (B, H, N, S + added) scores; in both of the given ones True means hidden."""
    merged: Tensor | None = None
    batch, heads = q.shape[:2]
    if mask is not None:
        merged = _additive(mask, q.dtype)
        merged = merged.view(batch, heads, *mask.shape[1:]) if mask.dim() == 3 else merged
    if padding is not None:
        hidden = _additive(padding, q.dtype).view(batch, 1, 1, -1)
        merged = hidden if merged is None else merged + hidden
    return merged if merged is None or not added else F.pad(merged, (0, added))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def shifted_window_attention(core: Core, module: Any, x: Tensor) -> Tensor:
    """The forward of torchvision's ``ShiftedWindowAttention``: (B, H, W, C) -> (B, H, W, C)."""
    windows = Windows.of(x, module.window_size, module.shift_size)
    parts = windows.partition(x)
    q, k, v = F.linear(parts, module.qkv.weight, module.qkv.bias).unflatten(-1, (3, module.num_heads, -1)).unbind(2)
    mask = module.get_relative_position_bias()
    if (apart := windows.mask(x)) is not None:
        mask = (mask + apart[:, None]).repeat(len(parts) // len(apart), 1, 1, 1)
    dropout = module.attention_dropout if module.training else 0.0
    attend = Fused(-3, mask, False, (x.shape[-1] // module.num_heads) ** -0.5, {"dropout_p": dropout})
    y = core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attend).transpose(1, 2).flatten(2)
    y = F.dropout(F.linear(y, module.proj.weight, module.proj.bias), module.dropout, module.training)
    return windows.reverse(y).contiguous()
