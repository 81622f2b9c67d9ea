"""KAdaptation's released code (eric-ai-lab/PEViT, commit be6fb43): known, and refused with the reason.

There the value branch reads the query's fast factors, and the increment is reshaped in a way that mixes tokens, heads
and the images of a batch. No change of weights does that, so its checkpoints have no equal among ours; and since both
fast factors start at zero, the increment of every one that it trained is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from ..errors import GraftError
from .base import System, register_system


@register_system("kadaptation")
class PEViTCode(System):
    """The released CLIP ViT."""

    def method(self, state: Mapping[str, Tensor]) -> NoReturn:
        """Refuse."""
        raise GraftError(
            "kadaptation: checkpoints of the released code (PEViT) cannot be loaded, because its increment mixes the "
            "images of a batch and equals no change of weights; train with method='kadaptation', the form of the paper"
        )

    def place(self, key: str) -> NoReturn:
        """Refuse."""
        self.method({})

    def num_classes(self, state: Mapping[str, Tensor]) -> NoReturn:
        """Refuse."""
        self.method(state)
