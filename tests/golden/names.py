"""Where each official state-dict key of a case lives with us: in the backbone, an adapter or the head.

The official repository calls an adapter ``<block>.tuning_module`` and the classifier ``head.linear``; the
rest are the backbone's own names, which timm renames. One set of rules per form renames both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Rule = tuple[str, str | Callable[[re.Match[str]], str]]

# State that is a function of the config, which a converter may drop.
_IGNORABLE = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index|attn_mask)$")


def is_ignorable(key: str) -> bool:
    """Whether an official key may be absent, and is not loaded when present."""
    return _IGNORABLE.search(key) is not None


@dataclass(frozen=True)
class Home:
    """Where one official tensor belongs.

    Attributes:
        owner: ``backbone`` (``path`` is the module), ``adapter`` (``path`` is the adapted module or its
            block), ``norm`` (the extra BatchNorm before pooling) or ``head``.
        name: The tensor's name inside its owner.
    """

    owner: Literal["backbone", "adapter", "norm", "head"]
    path: str
    name: str


@dataclass(frozen=True)
class Names:
    """The renaming rules of one form; the first rule that matches a key applies.

    Attributes:
        rules: Pattern and replacement, as for ``re.sub``.
        extra_norm: ``norm.*`` is a BatchNorm of the adapter, not one of the backbone.
        dead: Pattern of keys that the official module owns and never uses; we have nothing like them.
    """

    rules: Sequence[Rule] = ()
    extra_norm: bool = False
    dead: str | None = None

    def is_dead(self, key: str) -> bool:
        """Whether the official module owns this tensor and never uses it."""
        return self.dead is not None and re.search(self.dead, key) is not None

    def home(self, key: str) -> Home:
        """The home of one official key that is not ignorable."""
        if key.startswith("head.linear."):
            return Home("head", "", key.removeprefix("head.linear."))
        if self.extra_norm and key.startswith("norm."):
            return Home("norm", "", key.removeprefix("norm."))
        renamed = self._rename(key)
        before, found, after = renamed.partition("tuning_module.")
        if found:
            return Home("adapter", before.removesuffix("."), "scale" if after == "se" else after)
        path, _, leaf = renamed.rpartition(".")
        return Home("backbone", path, leaf)

    def _rename(self, key: str) -> str:
        for pattern, replacement in self.rules:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                return renamed
        return key


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


RESNET = Names(extra_norm=True)
CLIP_RESNET = Names()
EFFICIENTNET = Names()
CONVNEXT = Names(
    rules=(
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^tuning_module_downsample\.(\d+)\.", _shifted("stages.{}.downsample.tuning_module.")),
        (r"^stages\.(\d+)\.(\d+)\.(.*)$", _convnext_block),
        (r"^norm\.", "head.norm."),
    )
)
SWIN = Names(rules=((r"^layers\.(\d+)\.downsample\.", _shifted("layers.{}.downsample.")),))
BIT = Names(
    rules=(
        (r"^root\.", "stem."),
        (r"^body\.block(\d+)\.unit(\d+)\.(.*)$", _bit_unit),
    )
)


def repnet(*, last_blocks: int) -> Names:
    """RepNet on a ResNet whose last stage has ``last_blocks`` blocks.

    Side 0 is added to the output of the max-pool, sides 1 to 4 beside the first block of each stage, side 5
    beside the third block of the last; the official code owns side 5 even where there is no such block.
    """
    rules = (
        (r"^tuning_module\.0\.encoder\.", "maxpool.tuning_module."),
        (r"^tuning_module\.([1-4])\.encoder\.", r"layer\1.0.tuning_module."),
        (r"^tuning_module\.5\.encoder\.", "layer4.2.tuning_module."),
    )
    return Names(rules, extra_norm=True, dead=None if last_blocks > 2 else r"^tuning_module\.5\.")
