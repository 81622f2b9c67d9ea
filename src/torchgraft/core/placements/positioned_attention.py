"""Attention that adds a bias per pair of positions, over a sequence in which some tokens have no position.

The bias, and the mask of shifted windows, have zeros in the rows and columns of these tokens, as in VPT's Swin
(arXiv 2203.12119). The library's own attention cannot be given a longer sequence: its bias has a fixed size. So the
core is written here once, and a reader per class says where its queries, bias and output layer are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...swap import original_class


@dataclasses.dataclass(frozen=True)
class Reader:
    """How one class of attention computes its parts.

    Attributes:
        qkv: Tokens (B, N, C) -> queries, keys and values, each (B, heads, N, C / heads).
        bias: The bias (1, heads, n, n) of the tokens with a position; None: it has none.
        project: The joined heads (B, N, C) -> the output.
        dropout: The rate at which attention weights are dropped now.
        wrap: The output as the class returns it.
    """

    qkv: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    bias: Callable[[Any], Tensor | None]
    project: Callable[[Any, Tensor], Tensor]
    dropout: Callable[[Any], float]
    wrap: Callable[[Tensor], Any] = lambda y: y


def reader_of(module: nn.Module) -> Reader | None:
    """The reader for an attention module, None for a class that is not known."""
    cls = original_class(module)
    return _READERS.get((cls.__module__, cls.__name__))


def attend(
    module: nn.Module,
    x: Tensor,
    count: int,
    *,
    at: int = 0,
    mask: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """The output (B, N, C) of the attention ``module`` for ``x`` with ``count`` tokens that have no position.

    Args:
        module: An attention module that :func:`reader_of` knows.
        x: Tokens (B, N, C).
        count: Number of tokens without a position.
        at: Index of the first of them.
        mask: Mask (windows, n, n) of the other tokens, added to the scores; B is a multiple of ``windows``, whose
            index runs fastest.
        added: A bias over all N tokens, (heads, N, N).
    """
    reader = reader_of(module)
    assert reader is not None, type(module)
    q, k, v = reader.qkv(module, x)
    own = reader.bias(module)
    bias = None if own is None else _grown(own, at, count)
    if mask is not None:
        shifted = _grown(mask, at, count).unsqueeze(1)
        bias = shifted if bias is None else bias + shifted
        bias = bias.repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
    if added is not None:
        bias = added if bias is None else bias + added
    bias = None if bias is None else bias.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=reader.dropout(module))
    return reader.project(module, y.transpose(1, 2).flatten(2))


def wrapped(module: nn.Module, y: Tensor) -> Any:
    """The output of :func:`attend` as the module itself returns it."""
    reader = reader_of(module)
    assert reader is not None, type(module)
    return reader.wrap(y)


def _grown(scores: Tensor, at: int, count: int) -> Tensor:
    """(..., n, n) with ``count`` rows and columns of zeros at index ``at``."""
    for axis in (-1, -2):
        size = list(scores.shape)
        size[axis] = count
        before, behind = scores.split([at, scores.shape[axis] - at], axis)
        scores = torch.cat([before, scores.new_zeros(size), behind], axis)
    return scores


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _beit_qkv(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bias = None if module.q_bias is None else torch.cat([module.q_bias, module.k_bias, module.v_bias])
    if module.qkv_bias_separate or bias is None:
        qkv = module.qkv(x) if bias is None else module.qkv(x) + bias
    else:
        qkv = F.linear(x, module.qkv.weight, bias)
    return _split_heads(qkv, module.num_heads)


def _separate_qkv(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        layer(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    return q, k, v


def _child_rate(module: Any) -> float:
    return module.attn_drop.p if module.attn_drop.training else 0.0


_READERS: dict[tuple[str, str], Reader] = {
    ("timm.models.swin_transformer", "WindowAttention"): Reader(
        qkv=lambda m, x: _split_heads(m.qkv(x), m.num_heads),
        bias=lambda m: m._get_rel_pos_bias(),
        project=lambda m, y: m.proj_drop(m.proj(y)),
        dropout=_child_rate,
    ),
    ("timm.models.beit", "Attention"): Reader(
        qkv=_beit_qkv,
        bias=lambda m: None if m.relative_position_bias_table is None else m._get_rel_pos_bias(),
        project=lambda m, y: m.proj_drop(m.proj(y)),
        dropout=_child_rate,
    ),
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): Reader(
        # Its layers are read, never called, so that adapters act on their weights alone.
        qkv=lambda m, x: _split_heads(F.linear(x, m.qkv.weight, m.qkv.bias), m.num_heads),
        bias=lambda m: m.get_relative_position_bias(),
        project=lambda m, y: F.dropout(F.linear(y, m.proj.weight, m.proj.bias), m.dropout, m.training),
        dropout=lambda m: m.attention_dropout if m.training else 0.0,
    ),
    ("transformers.models.swin.modeling_swin", "SwinAttention"): Reader(
        qkv=_separate_qkv,
        bias=lambda m: m.relative_position_bias(),
        project=lambda m, y: m.o_proj(y),
        dropout=lambda m: m.attention_dropout if m.training else 0.0,
        wrap=lambda y: (y, None),
    ),
}
"""By the module and the name of the class."""
