"""What the published Conv-Adapter code adds beside its bottlenecks, and how it starts them."""

from __future__ import annotations

from torch import nn

from ...core.anatomy import Anatomy, Site
from ...core.blocks import class_name
from ...core.layers import in_channels, is_batchnorm, out_channels
from ...core.placements import Parallel, Placement, Point, Train
from .before_pooling import block_family
from .conv_bottleneck import Init, bottleneck_width
from .linear_bottleneck import LinearBottleneck


def is_resnet(anatomy: Anatomy) -> bool:
    """Whether the blocks are bottlenecks of a timm or torchvision ResNet."""
    return block_family(anatomy) == "resnet" and anatomy.blocks[0].name == "Bottleneck"


def official_start(anatomy: Anatomy) -> Init:
    """How the published code starts the bottlenecks on this kind of backbone."""
    starts: dict[str, Init] = {"resnet": "kaiming", "convnext": "trunc", "_efficientnet_blocks": "fan_out"}
    return starts.get(block_family(anatomy), "default")


def official_source(anatomy: Anatomy, site: Site) -> Point:
    """The convolution's input; on BiT the raw output of conv1, before its norm and activation."""
    if block_family(anatomy) == "resnetv2" and site.block is not None:
        before = f"{site.block}.conv1"
        if before != site.path and before in anatomy.modules:
            return Point(before, "output")
    return Point(site.path, "input")


def named_norms(anatomy: Anatomy, adapted: set[str]) -> list[Placement]:
    """Copies of the norms that the published code trains by their names: LayerNorms and the final norm."""
    named = [s for s in anatomy.find("norm") if "norm" in s.path.rpartition(".")[2]]
    layers = [s for s in named if s.kind == "layernorm"]
    final = [s for s in named if s.block is None and s not in layers and not is_batchnorm(anatomy.module(s.path))]
    chosen = [s for s in layers + final if s.block is None or s.block in adapted]
    return [
        Train(s.path, {n: p for n, p in anatomy.module(s.path)._parameters.items() if p is not None}) for s in chosen
    ]


def beside_pooling(anatomy: Anatomy, reduction: float) -> list[Placement]:
    """CLIP's attention pooling: from the position-embedded tokens to the attention's output."""
    placed: list[Placement] = []
    for path, module in anatomy.modules.items():
        if class_name(module) != "AttentionPool2d" or not anatomy.selection(path, anatomy.address(path)):
            continue
        reader = next(n for n in ("qkv", "q") if isinstance(getattr(module, n, None), nn.Linear))
        width, out = in_channels(anatomy.module(f"{path}.{reader}")), out_channels(anatomy.module(f"{path}.proj"))
        if width is None or out is None:
            continue
        form = LinearBottleneck(width, out, bottleneck_width(width, reduction), zero=False)
        placed.append(Parallel(form, Point(f"{path}.{reader}", "input"), Point(f"{path}.proj", "output")))
    return placed
