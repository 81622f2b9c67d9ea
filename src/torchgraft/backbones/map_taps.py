"""The maps inside a network that does not hand them out: torchvision's, those of transformers, one's own.

The stages come from the anatomy and its dry run; forward hooks take what the last block of every resolution returns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.layout import layout_at
from ..core.placements.base import Point
from ..core.placements.branch import Layout
from ..errors import GraftError


@dataclasses.dataclass(frozen=True)
class Tap:
    """Where one map comes from.

    Attributes:
        path: The block that returns it.
        layout: How its tensor holds the channels.
        channels: How many there are.
        stride: Pixels of the image per position.
    """

    path: str
    layout: Layout
    channels: int
    stride: int


class MapTaps(nn.Module):
    """A network that returns the maps of some of its blocks, (N, C, H, W) each, in place of its own output.

    Args:
        model: Any network that reads an image (N, C, H, W).
        taps: Which blocks.
    """

    def __init__(self, model: nn.Module, taps: list[Tap]) -> None:
        super().__init__()
        self.model, self.taps = model, taps

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run the network on images (N, C, H, W) and return the maps."""
        found: dict[str, Tensor] = {}

        def keep(path: str) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                found[path] = out if isinstance(out, Tensor) else out[0]

            return hook

        handles = [self.model.get_submodule(t.path).register_forward_hook(keep(t.path)) for t in self.taps]
        try:
            self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        return [_layout_for(x, tap).to_map(found[tap.path]) for tap in self.taps]


def find_taps(model: nn.Module, name: str) -> list[Tap]:
    """The last block of every resolution, from high to low.

    Args:
        model: The network, in eval mode.
        name: What to call it in messages.

    Raises:
        GraftError: No image could be guessed that it reads, or it has no blocks.
    """
    anatomy = Anatomy(model)
    image = anatomy.trace.input if anatomy.trace else None
    if image is None or len(image) != 4 or not anatomy.blocks:
        raise GraftError(f"{name} gives no feature maps: no blocks that compute on an image were found in it")
    found: dict[int, Tap] = {}
    for block in anatomy.blocks:
        point = Point(block.path, "output")
        try:
            layout, shape = layout_at(anatomy, point), anatomy.shape(point)
        except GraftError:
            continue  # a block that the forward does not call
        channels, width = _size(layout, shape)
        stride = round(image[-1] / width)
        found[stride] = Tap(block.path, layout, channels, stride)
    return [found[stride] for stride in sorted(found)]


def _size(layout: Layout, shape: tuple[int, ...]) -> tuple[int, int]:
    """Channels and width of a map."""
    if layout.name == "NC...":
        return shape[1], shape[-1]
    if layout.name == "N...C":
        return shape[-1], shape[-2]
    return shape[-1], layout.grid[1] if layout.grid else round((shape[1] - layout.prefix) ** 0.5)


def _layout_for(image: Tensor, tap: Tap) -> Layout:
    """The tap's layout, with the grid that tokens of this image stand on."""
    if tap.layout.name != "NLC":
        return tap.layout
    height, width = (-(-size // tap.stride) for size in image.shape[-2:])
    return dataclasses.replace(tap.layout, grid=(height, width))
