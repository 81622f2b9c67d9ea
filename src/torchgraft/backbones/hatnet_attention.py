"""The attention of HAT-Net: H-MHSA of "Vision Transformers with Hierarchical Attention", arXiv:2106.03180.

It runs twice, first inside G x G windows, then from every position to an average-pooled map. x (B, C, H, W), h = C / d
heads:

    q, k, v = qkv(norm(x))                                                 (B, h, H W, d) each
    L = softmax(q k^T / sqrt(d)) v                                         inside each window: (B, C, H, W)
    A = grid_norm(x + L)
    K, V = kv(ds_norm(avg_pool_r(A)))                                      (B, h, (H // r) (W // r), d) each
    attn(x) = proj(A + softmax(q(A) K^T / sqrt(d)) V)

and with G = 1 attn(x) = proj(softmax(q k^T / sqrt(d)) v) alone. Every norm is a GroupNorm with one group. Where a map
is no multiple of G, the windows at its edge are padded and the padding is hidden from the softmax.
"""

# Annotations are objects here, not strings: FX hands that of an input on to TorchScript, which knows no string.
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GroupNorm1
from torch import Tensor, fx, nn

map_norm = partial(GroupNorm1, eps=1e-6)
"""The norm of every map of the network: over channels and positions together, with a factor per channel."""


class Attention(nn.Module):
    """Attention of every position to every other: the form without windows (G = 1).

    Shapes: (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: C.
        head_dim: Channels d of a head; divides C.
        drop: Rate at which channels of the output are dropped.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(self, dim: int, head_dim: int, drop: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.head_dim = head_dim
        self.norm = map_norm(dim, **dd)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)
        self.drop = nn.Dropout2d(drop)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the residual stream."""
        q, k, v = _heads(self.qkv(self.norm(x)), 3, self.head_dim).unbind(0)
        attended = _map(F.scaled_dot_product_attention(q, k, v), x.shape[2], x.shape[3])
        return self.drop(self.proj(attended))


class HierarchicalAttention(Attention):
    """H-MHSA: attention inside windows, then to a pooled map.

    Shapes: (B, C, H, W) -> (B, C, H, W), for any H and W. A position attends to exactly the positions of its window
    that are on the map.

    Args:
        dim: C.
        head_dim: Channels d of a head; divides C.
        grid: Side G of the windows.
        ratio: Side r of the squares that the second attention's keys and values average; a map smaller than that is
            averaged as a whole.
        drop: Rate at which channels of the output are dropped.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        grid: int,
        ratio: int,
        drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, head_dim, drop, device=device, dtype=dtype)
        dd = {"device": device, "dtype": dtype}
        self.grid, self.ratio = grid, ratio
        self.grid_norm = map_norm(dim, **dd)
        self.q = nn.Conv2d(dim, dim, 1, **dd)
        self.ds_norm = map_norm(dim, **dd)
        self.kv = nn.Conv2d(dim, 2 * dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the residual stream."""
        _, _, height, width = x.shape
        qkv = self.qkv(self.norm(x))
        # Only what the windows hold is padded, so that no norm and no bias ever sees the padding.
        q, k, v = _windows(qkv, 3, self.head_dim, self.grid).unbind(0)
        local = F.scaled_dot_product_attention(q, k, v, attn_mask=_on_the_map(x, self.grid))
        # x and a come first in the sums: their memory format is the one to keep.
        a = self.grid_norm(x + _from_windows(local, height, width, self.grid))
        query = _heads(self.q(a), 1, self.head_dim)[0]
        key, value = _heads(self.kv(self.ds_norm(_pooled(a, self.ratio))), 2, self.head_dim).unbind(0)
        distant = F.scaled_dot_product_attention(query, key, value)
        return self.drop(self.proj(a + _map(distant, height, width)))


def _heads(x: Tensor, parts: int, head_dim: int) -> Tensor:
    """(B, P h d, H, W) -> (P, B, h, H W, d); of a channels-last map no copy is made."""
    tokens = x.flatten(2).transpose(1, 2).contiguous()
    return tokens.unflatten(2, [parts, -1, head_dim]).permute(2, 0, 3, 1, 4)


def _map(heads: Tensor, height: int, width: int) -> Tensor:
    """(B, h, H W, d) -> (B, h d, H, W)."""
    return heads.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, [height, width])


@fx.wrap
def _windows(x: Tensor, parts: int, head_dim: int, grid: int) -> Tensor:
    """(B, P h d, H, W) -> (P, B rows columns, h, G G, d): windows of the map, padded with zeros below and right.

    Functions that decide by the size of the map are one node each in a graph of FX, so that it serves every size.
    """
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1)
    below, right = -height % grid, -width % grid
    if below > 0 or right > 0:
        x = F.pad(x, [0, 0, 0, right, 0, below])
    rows, columns = (height + below) // grid, (width + right) // grid
    heads = channels // (parts * head_dim)
    x = x.reshape(batch, rows, grid, columns, grid, parts, heads, head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.reshape(parts, batch * rows * columns, heads, grid * grid, head_dim)


def _from_windows(x: Tensor, height: int, width: int, grid: int) -> Tensor:
    """(B rows columns, h, G G, d) -> (B, h d, H, W): the inverse of :func:`_windows`, without the padding."""
    rows, columns = -(-height // grid), -(-width // grid)
    _, heads, _, head_dim = x.shape
    x = x.reshape(-1, rows, columns, heads, grid, grid, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(-1, rows * grid, columns * grid, heads * head_dim)
    return x[:, :height, :width].permute(0, 3, 1, 2)


@fx.wrap
def _on_the_map(x: Tensor, grid: int) -> Tensor | None:
    """Which positions of the windows are no padding: (B rows columns, 1, 1, G G); None where all are on the map."""
    batch, _, height, width = x.shape
    below, right = -height % grid, -width % grid
    mask: Tensor | None = None
    if below > 0 or right > 0:
        real = torch.ones(height, width, dtype=torch.bool, device=x.device)
        real = F.pad(real, [0, right, 0, below]).unflatten(1, [-1, grid]).unflatten(0, [-1, grid])
        mask = real.transpose(1, 2).reshape(-1, 1, 1, grid * grid).repeat(batch, 1, 1, 1)
    return mask


@fx.wrap
def _pooled(x: Tensor, ratio: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H // r, W // r): means of squares; along a side shorter than r, of all of it."""
    return F.avg_pool2d(x, [min(ratio, x.shape[2]), min(ratio, x.shape[3])])
