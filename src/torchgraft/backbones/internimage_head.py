"""The head of InternImage-H and -G: two maps are joined and pooled by attention.

    a = PixelShuffle_2(W4 x4) + W3 x3            x4 (N, 8C, H/32, W/32), x3 (N, 4C, H/16, W/16) -> (N, D, H/16, W/16)
    q = W_q LN(mean token),  k = W_k LN(a),  v = W_v LN(a)                            the tokens are the pixels of a
    logits = fc(LN(proj(softmax(q k^T / sqrt(d)) v)))                                 D -> E -> classes

Source: "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", arXiv:2211.05778.
D = 1024, E = 768 and 16 heads in the published sizes.
"""

# Annotations are objects here, not strings: FX hands that of an input on to TorchScript, which knows no string.
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm, SelectAdaptivePool2d
from torch import Tensor, nn

__all__ = ["AttentionPool", "ClipFusion", "ClipHead"]


class ClipFusion(nn.Module):
    """The last two maps as one of the finer resolution.

    Shapes: x3 (N, C3, H, W) and x4 (N, C4, ceil(H / 2), ceil(W / 2)) -> (N, D, H, W).

    Args:
        fine_dim: C3.
        deep_dim: C4.
        dim: D.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(self, fine_dim: int, deep_dim: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.deep = nn.Conv2d(deep_dim, 4 * dim, 1, **dd)
        self.shuffle = nn.PixelShuffle(2)
        self.fine = nn.Conv2d(fine_dim, dim, 1, **dd)

    def forward(self, fine: Tensor, deep: Tensor) -> Tensor:
        """The joined map."""
        fine = self.fine(fine)
        # Pixel i of the coarse map stands over pixel 2 i of the fine one: of an odd size the last pair is cut.
        return fine + self.shuffle(self.deep(deep))[:, :, : fine.shape[2], : fine.shape[3]]


class AttentionPool(nn.Module):
    """The mean token asks all tokens.

    Shapes: (N, D, H, W) -> (N, E). Parameters: ``3 D (D + 1) + 6 D + E (D + 1)``.

    Args:
        dim: D.
        num_heads: Heads; divides D.
        out_dim: E.
        qkv_bias: Whether q, k and v have a bias.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, dim: int, num_heads: int, out_dim: int, qkv_bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.norm_q = LayerNorm(dim, **dd)
        self.norm_k = LayerNorm(dim, **dd)
        self.norm_v = LayerNorm(dim, **dd)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.k = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """The pooled vector."""
        tokens = x.flatten(2).transpose(1, 2)
        q = self._heads(self.q(self.norm_q(tokens.mean(1, keepdim=True))))
        k = self._heads(self.k(self.norm_k(tokens)))
        v = self._heads(self.v(self.norm_v(tokens)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (N, heads, L, D / heads)."""
        return x.unflatten(2, [self.num_heads, -1]).transpose(1, 2)


class ClipHead(nn.Module):
    """Pooling, norm and classifier behind :class:`ClipFusion`.

    Shapes: (N, D, H, W) -> (N, classes); without classes (N, E), and without pooling the map itself.

    Args:
        dim: D.
        out_dim: E.
        num_heads: Heads of the attention.
        num_classes: Classes; 0: no classifier.
        pool_type: ``"attn"``, the published one; any of timm's pools the map without attention and norm, and an empty
            string not at all.
        drop_rate: Dropout ahead of the classifier.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int,
        num_classes: int,
        pool_type: str = "attn",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.out_dim, self.num_heads = dim, out_dim, num_heads
        self._pool(pool_type, device, dtype)
        self.drop = nn.Dropout(drop_rate)
        self._classify(num_classes, device, dtype)

    def reset(self, num_classes: int, pool_type: str | None = None, device: Any = None, dtype: Any = None) -> None:
        """Make a new classifier, and a new pooling where another one is named."""
        if pool_type is not None and pool_type != self.pool_type:
            self._pool(pool_type, device, dtype)
        self._classify(num_classes, device, dtype)
        self.train(self.training)

    def _pool(self, pool_type: str, device: Any, dtype: Any) -> None:
        dd = {"device": device, "dtype": dtype}
        self.pool_type = pool_type
        self.global_pool: nn.Module
        self.norm: nn.Module
        if pool_type == "attn":
            self.global_pool = AttentionPool(self.dim, self.num_heads, self.out_dim, **dd)
            self.norm = LayerNorm(self.out_dim, **dd)
            self.num_features = self.out_dim
        else:
            pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
            self.global_pool, self.norm, self.num_features = pool, nn.Identity(), self.dim * pool.feat_mult()

    def _classify(self, num_classes: int, device: Any, dtype: Any) -> None:
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits; with ``pre_logits`` what the classifier reads."""
        x = self.drop(self.norm(self.global_pool(x)))
        return x if pre_logits else self.fc(x)
