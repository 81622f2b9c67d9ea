from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchgraft.errors import GraftError
from torchgraft.tasks.denseclip import TextEncoder


def test_contexts_of_each_image_give_its_own_embeddings(text_encoder: TextEncoder, class_tokens: Tensor) -> None:
    contexts = torch.randn(3, 4, 32)
    together = text_encoder(class_tokens, contexts)
    assert together.shape == (3, 4, 24)
    for image in range(3):
        torch.testing.assert_close(together[image], text_encoder(class_tokens, contexts[image : image + 1])[0])


def test_what_stands_behind_the_end_of_text_changes_nothing(text_encoder: TextEncoder, class_tokens: Tensor) -> None:
    padded = class_tokens.clone()
    padded[0, 3:] = 11
    contexts = torch.randn(1, 4, 32)
    torch.testing.assert_close(text_encoder(padded, contexts), text_encoder(class_tokens, contexts))


def test_more_tokens_than_positions_are_refused(text_encoder: TextEncoder, class_tokens: Tensor) -> None:
    with pytest.raises(GraftError, match="5 class tokens and 5 contexts are 10 tokens"):
        text_encoder(class_tokens, torch.randn(1, 5, 32))


def test_the_encoder_of_the_published_rn50_has_its_parameter_count() -> None:
    with torch.device("meta"):
        encoder = TextEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 63_657_472
