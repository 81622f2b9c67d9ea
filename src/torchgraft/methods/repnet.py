"""RepNet (Yang, Rakin and Fan, "Rep-Net: Efficient On-Device Learning via Feature Reprogramming").

CVPR 2022, pp. 12277-12286. A narrow side network runs beside the frozen one and adds to it once per stage:

    P(u) = up( bn2 W2 relu( bn1 W1 pool(u) ) )        W1: k x k, 2 groups, width = C_in * expand    W2: 1 x 1

pool halves the map; up is bilinear, to the size of the block's output. With B_i the first block of stage i:

    side 0      m + P(pool(image))     image -> what enters the first block (ResNet: output of the max-pool)
    side i      B_i(x) + P(x)          beside the first block of every stage
    side last   B(x) + P(x)            beside the third block of the last stage, where there is one

Published on ResNet-50 (wiring of ASU-ESIC-FAN-Lab/RepNet, commit 9173f69); the same rule serves every ConvNet
with stages. The published Conv-Adapter code (commit 97e1fc8) contains it with ``expand=1`` (34,724,200 parameters
on ResNet-50, more than the backbone) and a remark that 1/4 is meant for ResNets, which is our default; that code
also adds side 1 twice (``twice``) and weight-standardises every bias-free convolution. ``standardise`` does this
to the side network, never to the frozen backbone.

Parameters per side, m = C_in * expand to a multiple of 8: ``k k C_in m / 2 + 2 m + m C_out + 2 C_out``. Not
mergeable: activations and pooling stand in the way. Start: bn2 has scale zero, so the pretrained network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from timm.layers import make_divisible
from torch import nn

from ..core.anatomy import Anatomy
from ..core.blocks import Block, inner_modules
from ..core.layers import is_conv
from ..core.method import Method, register
from ..core.placements import MAP, Parallel, Placement, Point
from ..errors import GraftError
from .forms.program_module import ProgramModule


@register("repnet")
@dataclasses.dataclass(frozen=True)
class RepNet(Method):
    """Config of RepNet.

    Attributes:
        expand: Width of a side's middle as a multiple of its input channels; 1 is what the code as published
            does.
        kernel: Kernel size; 3 where the output map is 7 pixels wide for ``image_size``, as published.
        image_size: Side of the image in pixels for that rule. It fixes the parameters' shapes, so that they do
            not depend on the size of the images at hand.
        groups: Groups of the k x k convolutions (1 for the side that reads the image).
        twice: Add side 1 twice, as published.
        standardise: Standardise the weights of the side network's convolutions, as published.
    """

    expand: float = 0.25
    kernel: int = 5
    image_size: int = 224
    groups: int = 2
    twice: bool = False
    standardise: bool = False

    def __post_init__(self) -> None:
        if self.expand <= 0:
            raise GraftError(f"repnet: expand={self.expand} is not valid; expected more than 0")
        for name in ("kernel", "image_size", "groups"):
            if getattr(self, name) < 1:
                raise GraftError(f"repnet: {name}={getattr(self, name)} is not valid; expected at least 1")
        if self.kernel % 2 == 0:
            raise GraftError(f"repnet: kernel={self.kernel} is not valid; expected an odd number")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """The side of the image, one per stage, and the last one."""
        stages = _stages(anatomy)
        firsts = [blocks[0].path for blocks in stages]
        beside = firsts + [b.path for b in stages[-1][2:3]]
        chosen = {site.path for site in anatomy.find("block")}
        if not chosen.intersection(beside):
            raise GraftError(
                f"repnet: the selection leaves out every block of {type(anatomy.model).__name__} that a side stands "
                f"beside; they are {', '.join(beside)}"
            )
        placed: list[Placement] = [self._of_image(anatomy, firsts[0])] if firsts[0] in chosen else []
        times = {firsts[0]: 2 if self.twice else 1}
        return placed + [self._beside(anatomy, p, times=times.get(p, 1)) for p in beside if p in chosen]

    def _of_image(self, anatomy: Anatomy, block: str) -> Placement:
        assert anatomy.trace is not None and anatomy.stem is not None
        image, entry = anatomy.shape(Point(anatomy.stem, "input")), anatomy.shape(Point(block, "input"))
        target = _entry(anatomy, block)
        before = [anatomy.module(p) for p in anatomy.trace.calls if p and not _in_block(anatomy, p)]
        form = ProgramModule(
            image[1], entry[1], expand=self.expand, kernel=self._kernel(anatomy, entry), groups=1,
            shrink=round(image[2] / entry[2]), ceil=_round_up(before), standardise=self.standardise,
        )  # fmt: skip
        return Parallel(form, Point(anatomy.stem, "input"), target, early=True, slot="side")

    def _beside(self, anatomy: Anatomy, block: str, *, times: int) -> Placement:
        x, y = anatomy.shape(Point(block, "input")), anatomy.shape(Point(block, "output"))
        width = make_divisible(int(x[1] * self.expand), 8)
        groups = self.groups if x[1] % self.groups == 0 and width % self.groups == 0 else 1
        ratio = max(1, round(x[2] / y[2]))
        form = ProgramModule(
            x[1], y[1], expand=self.expand, kernel=self._kernel(anatomy, y), groups=groups, ratio=ratio, times=times,
            ceil=_round_up(m for _, m in inner_modules(anatomy.module(block))), standardise=self.standardise,
        )  # fmt: skip
        return Parallel(form, Point(block, "input"), Point(block, "output"), early=True, slot="side")

    def _kernel(self, anatomy: Anatomy, shape: tuple[int, ...]) -> int:
        assert anatomy.trace is not None and anatomy.trace.input is not None
        stride = round(anatomy.trace.input[2] / shape[2])
        return 3 if self.image_size // stride == 7 else self.kernel


def _stages(anatomy: Anatomy) -> list[tuple[Block, ...]]:
    """The blocks of every stage that looks around in space (MobileNetV3's last stage is 1 x 1 and does not).

    Raises:
        GraftError: Nothing to run beside: no image, no stages, or blocks that do not work on (N, C, H, W) maps.
    """
    name = type(anatomy.model).__name__
    shape = anatomy.trace.input if anatomy.trace else None
    if shape is None or len(shape) != 4 or anatomy.stem is None or not is_conv(anatomy.module(anatomy.stem)):
        raise GraftError(
            f"repnet: {name} was not seen to read an image in the dry run (its input: {shape}) and the side network "
            "reads the image; give `example=` or use another method"
        )
    stages = []
    for stage in anatomy.stages:
        first = stage.blocks[0].path
        maps = all(s is not None and len(s) == 4 for s in anatomy.shapes(first))
        if not maps or anatomy.layout(Point(first, "input")) != MAP:
            raise GraftError(
                f"repnet: block {first!r} of {name} does not work on (N, C, H, W) maps, beside which a network of "
                "convolutions and pooling could run; use conv-adapter"
            )
        if anatomy.inside(first, "spatial_conv", "attn"):
            stages.append(stage.blocks)
    if len(stages) < 2:
        raise GraftError(
            f"repnet: {name} has {len(stages)} stages of convolutional blocks; the side network adds to a ConvNet once "
            "per stage and needs at least 2; use conv-adapter, which goes beside every block"
        )
    return stages


def _entry(anatomy: Anatomy, block: str) -> Point:
    """Where what enters the first block is made: the output of the last layer before it (a ResNet's max-pool).

    Outside the block on purpose: under gradient checkpointing a block runs twice and what stands before it once.
    """
    assert anatomy.trace is not None
    calls = anatomy.trace.calls
    start = min(c.order for p, c in calls.items() if p == block or p.startswith(block + "."))
    ahead = [p for p, c in calls.items() if c.order < start and c.count == 1 and c.output == calls[block].input]
    layers = {p: anatomy.module(p) for p in ahead if p}
    ahead = [
        p
        for p, layer in layers.items()
        if not isinstance(layer, nn.Identity) and next(inner_modules(layer), None) is None
    ]
    if not ahead:
        return Point(block, "input")
    return Point(max(ahead, key=lambda p: calls[p].order), "output")


def _in_block(anatomy: Anatomy, path: str) -> bool:
    return any(path == b.path or path.startswith(b.path + ".") for b in anatomy.blocks)


def _round_up(layers: Iterable[nn.Module]) -> bool:
    """Whether all strided layers give ceil(H / stride) rows: they pad, so that one row in gives one row out."""
    padded = 0
    for layer in layers:
        if isinstance(layer, nn.ConstantPad2d):
            padded = layer.padding[0]
        if not is_conv(layer) and not isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
            continue
        kernel, stride, padding, dilation = (
            _first(getattr(layer, name, 1)) for name in ("kernel_size", "stride", "padding", "dilation")
        )
        same = type(layer).__name__.endswith("Same") or getattr(layer, "ceil_mode", False)
        if stride > 1 and not same and (2 * (padding + padded) - dilation * (kernel - 1)) // stride + 1 < 1:
            return False
        padded = 0
    return True


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value
