"""The decoder that refines text features with an image: context-aware prompting.

    m = LN(Lin(LN(V)))                                         V (B, N, D_v) -> (B, N, d)
    x = Lin(LN(t))                                             t (B, K, D_q) -> (B, K, d)
    L times: x = x + SA(LN1 x); x = x + CA(LN2 x, m, m); x = x + Dropout(MLP(LN3 x))
    v = Lin(LN(x))                                             (B, K, D_q)

Queries, keys and values have no bias; the output of an attention has one and is dropped out.

Source: "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", arXiv 2112.01518.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError


class Attention(nn.Module):
    """Multi-head attention of queries (B, K, d) to a memory (B, N, d).

    Args:
        width: Width d.
        heads: Attention heads.
        dropout: Rate behind the output projection; the weights of the attention are never dropped.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Queries (B, K, d) and memory (B, N, d) to (B, K, d)."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, query), (self.k_proj, memory), (self.v_proj, memory))
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(attended))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each behind a layer norm and added.

    Args:
        width: Width d; the MLP is 4 d wide.
        heads: Attention heads.
        dropout: Rate of every dropout.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = Attention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries (B, K, d) and memory (B, N, d) to queries."""
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.dropout(self.mlp(self.norm3(x)))


class ContextDecoder(nn.Module):
    """Text or context queries that look at the image.

    Args:
        width: Width d of the decoder.
        heads: Attention heads.
        layers: Layers L; the published configurations have 3.
        visual_dim: Width D_v of the visual tokens.
        dropout: Rate of every dropout.
        query_dim: Width D_q of the queries and the output; default: ``visual_dim``.

    Raises:
        GraftError: The heads do not divide the width.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        heads: int = 4,
        layers: int = 3,
        visual_dim: int = 1024,
        dropout: float = 0.1,
        query_dim: int | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise GraftError(f"heads={heads} does not divide the context decoder's width={width}; choose a divisor")
        query_dim = visual_dim if query_dim is None else query_dim
        self.memory_proj = nn.Sequential(nn.LayerNorm(visual_dim), nn.Linear(visual_dim, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(query_dim), nn.Linear(query_dim, width))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, query_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, queries: Tensor, visual: Tensor) -> Tensor:
        """Queries (B, K, D_q) and visual tokens (B, N, D_v) to (B, K, D_q)."""
        memory, x = self.memory_proj(visual), self.text_proj(queries)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.out_proj(x)
