"""ST-Adapter (Pan et al., "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning").

arXiv 2206.13559, NeurIPS 2022; code linziyi96/st-adapter, commit b914b38. A frozen image model sees every frame
alone; on its residual stream sit bottlenecks in which patches look at the same place in the frames around them:

    X <- X + conv3d(X W1 + b1) W2 + b2        X: the patch tokens, (B, T, H, W, d)

W1: d -> ``width``; conv3d: depth-wise over (time, height, width), ``kernel`` taps, zero padding, bias; W2 back. There
is no activation, norm or scale. Class and register tokens pass by. It sits in front of the norm of the attention
(``pre_attn``) and of the MLP (``pre_mlp``), so that the skip connection carries the change too.

Blocks without attention (ConvNets, mixers) get one at their input; that is ours.

Parameters per adapter: ``2 d c + c kt kh kw + 2 c + d`` (c = width). CLIP B/16: 7,110,144 (published as "12x384").
Start: W1, W2 as PyTorch draws them, every bias zero, conv3d zero: the pretrained network. Not mergeable: it mixes
frames, between a skip connection and a norm.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.anatomy import Anatomy
from ..core.branches import Branch
from ..core.frames import MixesFrames
from ..core.layers import is_conv
from ..core.method import Method, register
from ..core.placements import Placement, Point, Stream
from ..errors import GraftError


class FrameConv(nn.Module):
    """Depth-wise convolution over (T, H, W) that keeps the size.

    Its weight is (c, kt, kh, kw): PyTorch's own, with five axes, would forbid ``model.to(channels_last)``.

    Shapes: (B, c, T, H, W) -> the same. Parameters: ``c kt kh kw + c``, zero at the start.
    """

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.padding = tuple(k // 2 for k in kernel)
        self.weight = nn.Parameter(torch.zeros(channels, *kernel))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Mix each channel with its neighbours in time and space."""
        return F.conv3d(x, self.weight.unsqueeze(1), self.bias, padding=self.padding, groups=x.shape[1])


class FrameBottleneck(MixesFrames):
    """``fc2(conv(fc1(x)))`` on the frames of clips: the change that ST-Adapter makes.

    Shapes: (B*T, channels, H, W) -> the same, row ``b*T + t``.
    Parameters: ``2 channels width + width kt kh kw + 2 width + channels``.

    Args:
        channels: Width of the stream.
        width: Bottleneck width.
        kernel: Taps in time, height and width; odd.
        frames: T where no :class:`~torchgraft.core.frames.VideoWrapper` tells it.
    """

    def __init__(self, channels: int, width: int, kernel: tuple[int, int, int], frames: int = 1) -> None:
        super().__init__(frames)
        self.fc1 = nn.Linear(channels, width)
        self.conv = FrameConv(width, kernel)
        self.fc2 = nn.Linear(width, channels)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The change of the maps of B clips."""
        clips = (-1, self.clip_length(x.shape[0]))
        y = self.fc1(x.movedim(1, -1)).unflatten(0, clips)
        y = self.conv(y.movedim(-1, 1)).movedim(1, -1)
        return self.fc2(y.flatten(0, 1)).movedim(-1, 1)


@register("st-adapter")
@dataclasses.dataclass(frozen=True)
class STAdapter(Method):
    """Config of ST-Adapter; the defaults are the published "12x384" (only ``pre_mlp``).

    Attributes:
        width: c, the bottleneck width.
        kernel: Taps in (time, height, width), odd numbers.
        pre_attn: On the stream in front of the attention.
        pre_mlp: On the stream in front of the MLP.
        last: Only in the last blocks, this many; null: in all.
        frames: T of a batch of B*T images that does not come through ``VideoWrapper``, which tells it by itself.
            1: every image is a clip of its own.
    """

    width: int = 384
    kernel: tuple[int, int, int] = (3, 1, 1)
    pre_attn: bool = False
    pre_mlp: bool = True
    last: int | None = None
    frames: int = 1

    def __post_init__(self) -> None:
        for name in ("width", "last", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GraftError(f"st-adapter: {name}={value} is not valid; expected at least 1")
        if min(self.kernel) < 1 or math.prod(self.kernel) % 2 == 0:
            raise GraftError(f"st-adapter: kernel={list(self.kernel)} is not valid; expected three odd numbers")
        if not (self.pre_attn or self.pre_mlp):
            raise GraftError("st-adapter: pre_attn and pre_mlp are both false; expected at least one of them")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One or two bottlenecks per block with attention, one in front of any other block."""
        name = type(anatomy.model).__name__
        if anatomy.stem is None or not is_conv(anatomy.module(anatomy.stem)) or anatomy.conv_dims() != 2:
            raise GraftError(f"st-adapter: {name} reads no images, so a clip's frames cannot run through it")
        blocks = [site.path for site in anatomy.find("block")]
        if self.last is not None and self.last > len(blocks):
            raise GraftError(f"st-adapter: last={self.last}, but {len(blocks)} blocks are selected; use a smaller one")
        placed: dict[tuple[str, str], Placement] = {}
        branches = anatomy.branches("attn", "mlp")
        for block in blocks[-self.last :] if self.last else blocks:
            for placement in self._in_block(anatomy, block, [b for b in branches if b.block == block]):
                placed.setdefault((placement.home, placement.slot), placement)
        if not placed:
            raise GraftError(f"st-adapter: {name} has no block whose input is one tensor; use another backbone")
        return list(placed.values())

    def _in_block(self, anatomy: Anatomy, block: str, branches: list[Branch]) -> list[Placement]:
        if not any(b.kind == "attn" for b in branches):
            return self._at_input(anatomy, block, "stream")
        placed: list[Placement] = []
        for branch in branches:
            if branch.kind == "attn" and self.pre_attn:
                apart = anatomy.shape(branch.stream) != anatomy.shape(branch.adds)
                alone = apart or _is_first(anatomy, branch)
                placed += (
                    self._at_input(anatomy, block, "pre_attn") if alone else [self._at(anatomy, branch, "pre_attn")]
                )
            elif branch.kind == "mlp" and self.pre_mlp:
                placed.append(self._at(anatomy, branch, "pre_mlp"))
        return placed

    def _at(self, anatomy: Anatomy, branch: Branch, slot: str) -> Placement:
        """Between the branches of a block; what the branch adds carries the change on."""
        return self._stream(anatomy, branch.stream, branch.adds, slot)

    def _at_input(self, anatomy: Anatomy, block: str, slot: str) -> list[Placement]:
        """At the block's input, or that of its stage where blocks are given a list (dense blocks)."""
        stage = next(s.root for s in anatomy.stages if any(b.path == block for b in s.blocks))
        seen = [p for p in (block, stage) if p and anatomy.shapes(p)[0] is not None]
        return [self._stream(anatomy, Point(seen[0], "input"), None, slot)] if seen else []

    def _stream(self, anatomy: Anatomy, at: Point, carry: Point | None, slot: str) -> Placement:
        layout = anatomy.layout(at)
        form = FrameBottleneck(anatomy.channels(at, layout), self.width, self.kernel, self.frames)
        return Stream(form, at, carry=carry, layout=layout, slot=slot)


def _is_first(anatomy: Anatomy, branch: Branch) -> bool:
    """Whether the block computes nothing ahead of this branch, so that the branch's stream is the block's input."""
    assert anatomy.trace is not None
    calls = anatomy.trace.calls
    layers = [s.path for s in anatomy.inside(branch.block) if s.role not in ("block", "attn", "mlp", "norm")]
    first = min((p for p in layers if p in calls), key=lambda p: calls[p].order, default=branch.last)
    return first.startswith(f"{branch.module}.") or first in (*branch.first, branch.last)
