"""CLIP's transformer, shared by its image and its text encoder; parameter names are those of OpenAI's weights.

    x = x + MHA(ln_1 x);   x = x + c_proj(QuickGELU(c_fc(ln_2 x)))          x of shape (B, N, C)

Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from torch import Tensor, nn

from ...core.layers import QuickGELU


class ResidualAttentionBlock(nn.Module):
    """One pre-norm block.

    Args:
        width: Channels C.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) to tokens; ``mask`` (N, N) is added to the attention scores."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        width: Channels C.
        layers: Number of blocks.
        heads: Attention heads.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, taps: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, N, C) to the last block's output and those of the blocks ``taps``, in rising order."""
        tapped = []
        for index, block in enumerate(self.resblocks):
            x = block(x, mask)
            if index in taps:
                tapped.append(x)
        return x, tapped
