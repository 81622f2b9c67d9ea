"""Pro-tuning (Nie et al., "Pro-tuning: Unified Prompt Tuning for Vision Tasks").

arXiv 2207.14381, IEEE TCSVT 2023. **After the published idea, block details unconfirmed**: there is no official code,
and the layers below are those of a third-party re-implementation, with its channel attention repaired (it returned the
gate instead of the gated map). Between the stages of the frozen network a light block turns the feature map into a
prompt, which depends on the image, and adds it:

    F' = F + beta * V(F)        F: the map in front of a stage, (B, C, H, W); beta: a scalar, zero at the start

    V: 1 x 1 convolution (C -> w, in groups), K x K (depth-wise), 1 x 1 (w -> w), gate, 1 x 1 (w -> C, in groups)
    gate: x * sigmoid(fc2(relu(fc1(mean of x over space))))

with w = C / ``reduction``. Class and register tokens pass by. Transformers of a single stage are cut into four equal
groups of blocks. Not mergeable: a gate and a K x K convolution on a feature map.

Parameters at the defaults: ``1.625 C^2 + 30.0625 C + 1`` per block (from the formula; nothing published to compare
with): ResNet-50 2,298,872. Start: beta = 0, the pretrained network (``fusion="add"``, which has no beta: the last
convolution is zero).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.layers import ACTIVATIONS, is_conv, make_activation
from ..core.method import Method, register
from ..core.placements import Placement, Point, Stream
from ..errors import GraftError, nearest

Fusion = Literal["add_scalar", "add_channel", "add"]
Norm = Literal["batch", "group"]
GROUPS = 4
"""Groups of blocks that a network of a single stage is cut into."""


class ChannelGate(nn.Module):
    """``x * sigmoid(fc2(relu(fc1(mean(x)))))``, the mean over space.

    Shapes: (B, C, H, W) -> the same. Parameters: ``2 C h + C + h`` with h hidden channels.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel by what the whole map says about it."""
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class PromptBlock(nn.Module):
    """The prompt of a feature map, scaled by beta: what is added to the map.

    Shapes: (B, channels, H, W) -> the same.
    Parameters, with w = channels / reduction, g groups and h = w / se_ratio: ``2 C w / g + w + C`` (the outer
    convolutions), ``K K w + w``, ``w w + w``, ``2 w h + w + h`` and beta. C or w that g does not divide take
    fewer groups.

    Args:
        channels: C.
        config: Everything else.
    """

    def __init__(self, channels: int, config: ProTuning) -> None:
        super().__init__()
        width = max(1, channels // config.reduction)
        groups = math.gcd(channels, width, config.groups)
        self.conv1 = nn.Conv2d(channels, width, 1, groups=groups)
        self.between1 = _between(config, width)
        self.conv2 = nn.Conv2d(width, width, config.kernel, padding=config.kernel // 2, groups=width)
        self.between2 = _between(config, width)
        self.conv3 = nn.Conv2d(width, width, 1)
        hidden = max(1, width // config.se_ratio) if config.se_ratio else 0
        self.gate = ChannelGate(width, hidden) if hidden else nn.Identity()
        self.conv4 = nn.Conv2d(width, channels, 1, groups=groups)
        self.beta: nn.Parameter | None = None
        if config.fusion != "add":
            self.beta = nn.Parameter(torch.zeros(channels if config.fusion == "add_channel" else 1, 1, 1))
        else:
            nn.init.zeros_(self.conv4.weight)
            assert self.conv4.bias is not None
            nn.init.zeros_(self.conv4.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The prompt of (B, C, H, W)."""
        v = self.between2(self.conv2(self.between1(self.conv1(x))))
        v = self.conv4(self.gate(self.conv3(v)))
        return v if self.beta is None else self.beta * v


@register("pro-tuning")
@dataclasses.dataclass(frozen=True)
class ProTuning(Method):
    """Config of Pro-tuning. Every choice is open, because the original block is unknown.

    Attributes:
        reduction: C / w, the narrowing inside the block.
        groups: Groups of the first and the last convolution.
        kernel: K of the depth-wise convolution, odd.
        se_ratio: Narrowing inside the channel gate; 0: no gate.
        act: Activation behind the first two convolutions; null: none.
        norm: Norm behind the first two convolutions (``group``: one group); null: none.
        fusion: ``add_scalar``: beta is one number; ``add_channel``: one per channel; ``add``: no beta.
        position: ``pre``: in front of every stage; ``post``: behind it.
    """

    reduction: int = 1
    groups: int = 4
    kernel: int = 5
    se_ratio: int = 16
    act: str | None = None
    norm: Norm | None = None
    fusion: Fusion = "add_scalar"
    position: Literal["pre", "post"] = "pre"

    def __post_init__(self) -> None:
        for name, least in (("reduction", 1), ("groups", 1), ("kernel", 1), ("se_ratio", 0)):
            if getattr(self, name) < least:
                raise GraftError(f"pro-tuning: {name}={getattr(self, name)} is not valid; expected at least {least}")
        if self.kernel % 2 == 0:
            raise GraftError(f"pro-tuning: kernel={self.kernel} is not valid; expected an odd number")
        if self.act is not None and self.act not in ACTIVATIONS:
            raise GraftError(f"pro-tuning: act={self.act!r}; {nearest(self.act, ACTIVATIONS)}")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One block per stage, in front of it or behind it."""
        name = type(anatomy.model).__name__
        if anatomy.stem is None or not is_conv(anatomy.module(anatomy.stem)) or anatomy.conv_dims() != 2:
            raise GraftError(f"pro-tuning: {name} reads no images, so there is no feature map to make a prompt of")
        side: Literal["input", "output"] = "output" if self.position == "post" else "input"
        ends = [(root, blocks[-1 if self.position == "post" else 0]) for root, blocks in _stages(anatomy)]
        points = [point for root, block in ends for point in _at_end(anatomy, root, block, side)]
        if not points:
            raise GraftError(f"pro-tuning: {name} has no stages: it is no series of blocks; use another backbone")
        placed: list[Placement] = []
        for point in points:
            layout = anatomy.layout(point)
            form = PromptBlock(anatomy.channels(point, layout), self)
            placed.append(Stream(form, point, layout=layout, slot="prompt"))
        return placed


def _stages(anatomy: Anatomy) -> list[tuple[str, list[str]]]:
    """(module that is the stage, empty where there is none; its selected blocks), per selected stage."""
    selected = {site.path for site in anatomy.find("block")}
    stages = [(s.root, [b.path for b in s.blocks if b.path in selected]) for s in anatomy.stages]
    if len(stages) != 1:
        return [(root, blocks) for root, blocks in stages if blocks]
    blocks = stages[0][1]
    number = min(GROUPS, len(blocks))
    cuts = [len(blocks) * i // number for i in range(number + 1)] if number else []
    return [("", blocks[a:b]) for a, b in itertools.pairwise(cuts)]


def _at_end(anatomy: Anatomy, stage: str, block: str, side: Literal["input", "output"]) -> list[Point]:
    """Where a stage begins or ends: at its first or last block, unless the stage has another map there.

    That is so in front of the downsampling that opens a ConvNet's stage, and where blocks are given lists (dense
    blocks). Transformers merge patches inside their stages too; there the block's own width counts.
    """
    of_block, of_stage = (anatomy.shapes(p)[0 if side == "input" else 1] if p else None for p in (block, stage))
    own = of_block is not None and (of_stage in (None, of_block) or bool(anatomy.inside(block, "attn")))
    chosen = block if own else stage if of_stage is not None else None
    return [] if chosen is None else [Point(chosen, side)]


def _between(config: ProTuning, width: int) -> nn.Module:
    """The norm and the activation between two convolutions."""
    layers: list[nn.Module] = []
    if config.norm is not None:
        layers.append(nn.BatchNorm2d(width) if config.norm == "batch" else nn.GroupNorm(1, width))
    if config.act is not None:
        layers.append(make_activation(config.act))
    return nn.Sequential(*layers)
