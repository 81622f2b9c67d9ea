"""CLIP's attention pool as a dense projection into the joint image-text space.

A map x (B, C, H, W) becomes a pooled embedding (B, D) and one embedding per position (B, D, H, W):

    u = [mean(x) ; x_1 .. x_HW] + P            (1 + HW, C), P resized to the map
    o = W_c MHA(W_q u, W_k u, W_v u)           (1 + HW, D)

CLIP itself asks with the mean alone; here every position is a query. Weights are those of CLIP's ``visual.attnpool``.

Source: "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", arXiv 2112.01518.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError

PositionMode = Literal["resize", "crop_or_resize", "crop"]


def resize_positions(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a table of position embeddings bilinearly; the entry of the class token is kept.

    Args:
        table: (1 + S*S, C), the class token first.
        size: Rows and columns of the new grid.

    Returns:
        (1 + rows*columns, C); the table itself where the grid has that size.

    Raises:
        GraftError: The table has no square grid.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side + 1 != table.shape[0]:
        raise GraftError(f"a position table of {table.shape[0]} rows: expected one row and a square grid, 1 + S*S rows")
    if (side, side) == size:
        return table
    grid = table[1:].T.unflatten(1, (side, side))[None]
    resized = F.interpolate(grid, size, mode="bilinear", align_corners=False)
    return torch.cat([table[:1], resized[0].flatten(1).T])


class DenseAttentionPool(nn.Module):
    """Pooled and per-position embeddings of a map.

    Args:
        spatial_size: Side S of the grid of position embeddings.
        embed_dim: Channels C of the map.
        num_heads: Heads; must divide C.
        output_dim: Width D of the joint space.
        pos_mode: ``"resize"``: positions are resized to the map. ``"crop_or_resize"``: their upper left corner where
            the map is not larger than the grid, else resized. ``"crop"``: the corner only, as the published detection
            code has it.

    Raises:
        GraftError: The heads do not divide C, or the mode is unknown.
    """

    def __init__(
        self, spatial_size: int, embed_dim: int, num_heads: int, output_dim: int, *, pos_mode: PositionMode = "resize"
    ) -> None:
        super().__init__()
        if pos_mode not in get_args(PositionMode):
            raise GraftError(f"pos_mode={pos_mode!r}: expected one of {', '.join(get_args(PositionMode))}")
        if embed_dim % num_heads:
            raise GraftError(f"num_heads={num_heads} does not divide the {embed_dim} channels; choose a divisor")
        self.spatial_size, self.num_heads, self.pos_mode = spatial_size, num_heads, pos_mode
        self.positional_embedding = nn.Parameter(torch.randn(spatial_size**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the pooled embedding (B, D) and the dense ones (B, D, H, W).

        Raises:
            GraftError: ``pos_mode="crop"`` and the map is larger than the grid.
        """
        size = x.shape[-2], x.shape[-1]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self._positions(size)
        q, k, v = (
            proj(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1 + HW, C / heads)
        out = self.c_proj(attended.transpose(1, 2).flatten(2))
        return out[:, 0], out[:, 1:].transpose(1, 2).unflatten(2, size)

    def _positions(self, size: tuple[int, int]) -> Tensor:
        table, side = self.positional_embedding, self.spatial_size
        fits = max(size) <= side
        if self.pos_mode == "crop" and not fits:
            raise GraftError(
                f"a map of {size[0]} x {size[1]} is larger than the {side} x {side} grid of positions; "
                "use pos_mode='crop_or_resize' or smaller images"
            )
        if self.pos_mode == "resize" or not fits:
            return resize_positions(table, size)
        grid = table[1:].unflatten(0, (side, side))[: size[0], : size[1]]
        return torch.cat([table[:1], grid.flatten(0, 1)])


class ConvProjector(nn.Module):
    """A 1x1 convolution into the joint space; the pooled embedding is the mean of the dense ones.

    Args:
        embed_dim: Channels C of the map.
        output_dim: Width D of the joint space.
    """

    def __init__(self, embed_dim: int, output_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(embed_dim, output_dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the pooled embedding (B, D) and the dense ones (B, D, H, W)."""
        dense = self.proj(x)
        return dense.mean(dim=(2, 3)), dense
