"""CLIP's text encoder with learnable context tokens in front of a class name.

For the tokens [sot, name .., eot, 0 ..] of a class (N1 of them) and n contexts:

    X = [E(sot) ; ctx_1 .. ctx_n ; E(tok_1) .. E(tok_{N1-1})] + positional_embedding        (N1 + n, W)
    t = ln_final(Transformer_causal(X))[argmax(tokens) + n] @ text_projection               (D)

Source: "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", arXiv 2112.01518.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import GraftError
from .transformer import Transformer


class TextEncoder(nn.Module):
    """Class embeddings from token ids and contexts; parameter names are those of OpenAI's CLIP.

    Args:
        context_length: Longest sequence, contexts and class tokens together.
        vocab_size: Entries of the vocabulary; the last is the end-of-text token.
        width: Width W of the tokens.
        heads: Attention heads.
        layers: Blocks.
        embed_dim: Width D of the joint space.
    """

    causal_mask: Tensor

    def __init__(
        self,
        *,
        context_length: int = 13,
        vocab_size: int = 49408,
        width: int = 512,
        heads: int = 8,
        layers: int = 12,
        embed_dim: int = 1024,
    ) -> None:
        super().__init__()
        self.context_length, self.width, self.embed_dim = context_length, width, embed_dim
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, layers, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        mask = torch.full((context_length, context_length), float("-inf")).triu(1)
        self.register_buffer("causal_mask", mask, persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens: Tensor, contexts: Tensor) -> Tensor:
        """Embed every class under every set of contexts.

        Args:
            tokens: Ids (K, N1), int64: start, name, end, zeros.
            contexts: (B, n, W); B is 1 where all images share them.

        Returns:
            Embeddings (B, K, D).

        Raises:
            GraftError: Tokens and contexts together are longer than the encoder's position table.
        """
        (classes, class_len), (batch, n_ctx, _) = tokens.shape, contexts.shape
        length = class_len + n_ctx
        if length > self.context_length:
            raise GraftError(
                f"{class_len} class tokens and {n_ctx} contexts are {length} tokens, the text encoder has "
                f"{self.context_length} positions; use fewer contexts or shorter names"
            )
        names = self.token_embedding(tokens).expand(batch, -1, -1, -1)
        between = contexts[:, None].expand(-1, classes, -1, -1)
        x = torch.cat([names[:, :, :1], between, names[:, :, 1:]], dim=2) + self.positional_embedding[:length]
        x, _ = self.transformer(x.flatten(0, 1), self.causal_mask[:length, :length])
        # The end-of-text token has the largest id.
        end = (tokens.argmax(dim=-1) + n_ctx).repeat(batch)
        at_end = x[torch.arange(len(x), device=x.device), end]
        return (self.ln_final(at_end) @ self.text_projection).unflatten(0, (batch, classes))
