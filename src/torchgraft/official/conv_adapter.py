"""Conv-Adapter's official code (commit 97e1fc8), on its backbones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.method import Method
from ..errors import GraftError
from ..methods.conv_adapter import ConvAdapter
from ..methods.forms.before_pooling import block_family
from .base import register_system
from .renaming import Renaming, Rule


def _convnext_block(match: re.Match[str]) -> str:
    stage, block, rest = match.groups()
    rest = re.sub(r"^dwconv\.", "conv_dw.", rest)
    rest = re.sub(r"^pwconv(\d)\.", r"mlp.fc\1.", rest)
    return f"stages.{stage}.blocks.{block}.{rest}"


def _bit_unit(match: re.Match[str]) -> str:
    block, unit, rest = match.groups()
    rest = re.sub(r"^gn(\d)\.", r"norm\1.", rest)
    rest = re.sub(r"^downsample\.weight$", "downsample.conv.weight", rest)
    return f"stages.{int(block) - 1}.blocks.{int(unit) - 1}.{rest}"


def _shifted(template: str) -> Callable[[re.Match[str]], str]:
    return lambda match: template.format(int(match[1]) + 1)


RULES: dict[str, tuple[Rule, ...]] = {
    "convnext": (
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^tuning_module_downsample\.(\d+)\.", _shifted("stages.{}.downsample.tuning_module.")),
        (r"^stages\.(\d+)\.(\d+)\.(.*)$", _convnext_block),
        (r"^norm\.", "head.norm."),
    ),
    "swin_transformer": ((r"^layers\.(\d+)\.downsample\.", _shifted("layers.{}.downsample.")),),
    "resnetv2": (
        (r"^root\.", "stem."),
        (r"^body\.block(\d+)\.unit(\d+)\.(.*)$", _bit_unit),
    ),
}
"""Rules by the file of timm that holds the backbone's blocks."""


@register_system("conv_adapter")
class ConvAdapterCode(Renaming):
    """The official Conv-Adapter on ResNet, ConvNeXt, Swin, BiT, EfficientNetV2 and CLIP's ResNet."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.family = block_family(Anatomy(model))
        super().__init__(model, rules=RULES.get(self.family, ()), extra_norm=self.family == "resnet", **options)

    def method(self, state: Mapping[str, Tensor]) -> Method:
        """Conv-Adapter with preset "official" and the reduction of the checkpoint's widths."""
        first = next((t for k, t in state.items() if k.endswith("tuning_module.conv1.weight")), None)
        if first is None:
            raise GraftError("conv_adapter: the state holds no 'tuning_module.conv1.weight'; expected an adapted net")
        # conv1 has as many groups as outputs, so its second axis is C_in / width.
        return ConvAdapter(**{"preset": "official", "reduction": float(first.shape[1]), **self.options})
