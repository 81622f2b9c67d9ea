"""Language guidance of a visual backbone: learnable contexts, prompting by the image, pixel-text scores.

    t  = TextEncoder(contexts, class names)                                   (K, D)
    t' = t + gamma * ContextDecoder(t, V)         "post", the default         (B, K, D)
    t' = TextEncoder(ContextDecoder(contexts, V), class names)    "pre"
    s[b, k, h, w] = <z[b, :, h, w], t'[b, k]> of unit vectors                 (B, K, h, w)

V = [pooled ; dense embeddings of the image] (B, 1 + hw, D). The scores s, in [-1, 1], are concatenated to the map on
whose grid they live. "pre" runs the text encoder on B K sequences instead of K.

Source: "DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting", arXiv 2112.01518.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError
from .context_decoder import ContextDecoder
from .text import TextEncoder
from .visual import ClipViT, PooledTrunk, VisualFeatures

Prompting = Literal["post", "pre"]
_GAMMA = 1e-4  # initial weight of the decoder's output, as published


class Guided(NamedTuple):
    """What guidance makes of B images.

    Attributes:
        maps: The backbone's maps; that of the scores has K more channels.
        scores: Cosines (B, K, h, w).
        text: Class embeddings (B, K, D).
        visual: What the backbone gave.
    """

    maps: list[Tensor]
    scores: Tensor
    text: Tensor
    visual: VisualFeatures


class LanguageGuided(nn.Module):
    """A visual backbone with class scores from a frozen text encoder.

    Args:
        backbone: The visual side.
        text_encoder: The text side; its parameters are frozen, gradients pass through it to the contexts.
        class_tokens: Ids of the class names (K, N1), int64; the encoder's other positions are for contexts.
        decoder: Options of :class:`ContextDecoder`: ``width``, ``heads``, ``layers``, ``dropout``.
        prompting: ``"post"`` refines class embeddings by the image, ``"pre"`` makes contexts from it.
        concat_scaled: Divide the scores by ``tau`` before they are concatenated.
        tau: Temperature of the auxiliary loss.

    Raises:
        GraftError: The widths of the two sides differ, no position is left for contexts, or the mode is unknown.

    Attributes:
        contexts: Learnable contexts (1, n_ctx, W); with ``"pre"`` the queries they are made from.
        gamma: Weight (D) of the decoder's output; None with ``"pre"``.
        in_channels: Channels of the maps that :meth:`guide` returns.
        num_classes: K.
    """

    class_tokens: Tensor
    gamma: nn.Parameter | None

    def __init__(
        self,
        backbone: PooledTrunk | ClipViT,
        text_encoder: TextEncoder,
        class_tokens: Tensor,
        *,
        decoder: dict[str, Any] | None = None,
        prompting: Prompting = "post",
        concat_scaled: bool = False,
        tau: float = 0.07,
    ) -> None:
        super().__init__()
        if prompting not in get_args(Prompting):
            raise GraftError(f"prompting={prompting!r}: expected one of {', '.join(get_args(Prompting))}")
        width = text_encoder.embed_dim
        if backbone.embed_dim != width:
            raise GraftError(
                f"the backbone's embeddings have {backbone.embed_dim} channels, the text encoder's {width}; "
                "they must be the same joint space"
            )
        n_ctx = text_encoder.context_length - class_tokens.shape[1]
        if n_ctx < 1:
            raise GraftError(
                f"class names of {class_tokens.shape[1]} tokens leave no context among the text encoder's "
                f"{text_encoder.context_length} positions; use a longer context_length"
            )
        self.prompting, self.concat_scaled, self.tau = prompting, concat_scaled, tau
        self.num_classes = class_tokens.shape[0]
        self.backbone = backbone
        self.text_encoder = text_encoder.requires_grad_(False)
        self.register_buffer("class_tokens", class_tokens, persistent=False)
        self.context_decoder = ContextDecoder(
            visual_dim=width, query_dim=width if prompting == "post" else text_encoder.width, **(decoder or {})
        )
        self.contexts = nn.Parameter(torch.empty(1, n_ctx, text_encoder.width))
        # Far larger than CLIP's token embeddings; the published code starts so.
        nn.init.trunc_normal_(self.contexts)
        self.gamma = nn.Parameter(torch.full((width,), _GAMMA)) if prompting == "post" else None
        index = backbone.dense_index
        self.in_channels = tuple(
            channels + self.num_classes * (i == index) for i, channels in enumerate(backbone.channels)
        )
        self._cached: Tensor | None = None
        self.register_load_state_dict_pre_hook(LanguageGuided._forget)

    def guide(self, image: Tensor) -> Guided:
        """Images (B, 3, H, W) to maps with scores."""
        visual = self.backbone(image)
        text = self._text(visual)
        scores = score_map(visual.dense, text)
        joined = scores / self.tau if self.concat_scaled else scores
        index = self.backbone.dense_index
        maps = list(visual.maps)
        maps[index] = torch.cat([maps[index], joined], dim=1)
        return Guided(maps, scores, text, visual)

    def cache_text(self) -> None:
        """Compute the class embeddings once; kept until ``train()``, a move or loaded weights make them old.

        Raises:
            GraftError: With ``prompting="pre"`` they depend on the image.
        """
        if self.prompting == "pre":
            raise GraftError("prompting='pre': class embeddings depend on the image and cannot be kept; use 'post'")
        with torch.no_grad():
            self._cached = self.text_encoder(self.class_tokens, self.contexts)

    def train(self, mode: bool = True) -> LanguageGuided:
        """Switch between training and evaluation; training drops cached class embeddings."""
        if mode:
            self._cached = None
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> LanguageGuided:
        self._cached = None  # another device or dtype
        super()._apply(*args, **kwargs)
        return self

    def _forget(self, *_: Any) -> None:
        self._cached = None

    def _text(self, visual: VisualFeatures) -> Tensor:
        """Class embeddings (B, K, D) for these images."""
        memory = torch.cat([visual.pooled[:, None], visual.dense.flatten(2).transpose(1, 2)], dim=1)
        batch = len(memory)
        if self.gamma is None:
            contexts = self.context_decoder(self.contexts.expand(batch, -1, -1), memory)
            return self.text_encoder(self.class_tokens, contexts)
        text = self._cached if self._cached is not None else self.text_encoder(self.class_tokens, self.contexts)
        text = text.expand(batch, -1, -1)
        return text + self.gamma * self.context_decoder(text, memory)


def score_map(dense: Tensor, text: Tensor) -> Tensor:
    """Cosine of every position with every class.

    Args:
        dense: Embeddings of the positions (B, D, h, w).
        text: Embeddings of the classes (B, K, D).

    Returns:
        (B, K, h, w), in [-1, 1].
    """
    return torch.einsum("bdhw,bkd->bkhw", F.normalize(dense, dim=1), F.normalize(text, dim=2))
