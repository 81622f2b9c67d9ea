"""RepNet as the official Conv-Adapter code (commit 97e1fc8) has it, on ResNets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.method import Method
from ..errors import GraftError
from ..methods.repnet import RepNet
from .base import register_system
from .renaming import Renaming


@register_system("baselines")
class RepNetCode(Renaming):
    """Side 0 is added to the output of the max-pool, sides 1 to 4 beside the first block of each stage, side 5
    beside the third block of the last; the official code owns side 5 even where there is no such block.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        layer4: Any = model.layer4
        last_blocks = len(layer4)
        rules = (
            (r"^tuning_module\.0\.encoder\.", "maxpool.tuning_module."),
            (r"^tuning_module\.([1-4])\.encoder\.", r"layer\1.0.tuning_module."),
            (r"^tuning_module\.5\.encoder\.", "layer4.2.tuning_module."),
        )
        dead = None if last_blocks > 2 else r"^tuning_module\.5\."
        super().__init__(model, rules=rules, extra_norm=True, dead=dead, **options)

    def method(self, state: Mapping[str, Tensor]) -> Method:
        """RepNet; the width of its middle and the image size are not in the shapes."""
        if not {"expand", "image_size"} <= self.options.keys():
            raise GraftError("baselines: give expand= and image_size= as the checkpoint was trained with")
        return RepNet(**{"twice": True, **self.options})
