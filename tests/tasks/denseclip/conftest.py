"""A tiny DenseCLIP on a tiny backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchgraft.tasks.denseclip import ClipViT, TextEncoder

SOT, EOT = 58, 59


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def class_tokens() -> Tensor:
    return torch.tensor([[SOT, 3, EOT, 0, 0], [SOT, 7, 9, EOT, 0], [SOT, 5, EOT, 0, 0], [SOT, 1, 2, 4, EOT]])


@pytest.fixture
def text_encoder() -> TextEncoder:
    return TextEncoder(context_length=9, vocab_size=60, width=32, heads=4, layers=2, embed_dim=24)


@pytest.fixture
def vit() -> Callable[..., ClipViT]:
    def build(**options: Any) -> ClipViT:
        small = {"width": 16, "layers": 4, "heads": 2, "input_resolution": 64, "output_dim": 24}
        return ClipViT(**{**small, "out_indices": (0, 1, 2, 3), **options})

    return build


@pytest.fixture
def decoder() -> dict[str, int]:
    return {"width": 16, "heads": 2, "layers": 1}
