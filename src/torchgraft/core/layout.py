"""How the tensor at a point of a model holds its channels: as a map, as a channels-last map, or as tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import GraftError
from ..swap import original_class
from .blocks import inner_modules
from .layers import channel_axis, in_channels, is_batchnorm, is_conv, is_norm, out_channels
from .placements.base import Point
from .placements.branch import Layout

if TYPE_CHECKING:
    from .anatomy import Anatomy

_SCRAMBLED = {("hiera", "HieraBlock"), ("nest", "TransformerLayer")}
"""Blocks whose tokens stand in the order of windows, not in that of the image: (file, class)."""
_MOST_PREFIX = 32
"""More tokens than this beside the grid mean that the grid is not the right one."""


def layout_at(anatomy: Anatomy, point: Point) -> Layout:
    """The layout of the tensor at ``point``, told by the layers that the dry run saw working on it.

    Raises:
        GraftError: The dry run did not see the point, or its tokens do not stand in the order of the image.
    """
    shape = anatomy.shape(point)
    if _axis(anatomy, point, shape) == 1:
        return Layout()
    block = anatomy.block_of(point.path)
    if block is not None:
        cls = original_class(anatomy.module(block))
        if (cls.__module__.rpartition(".")[2], cls.__name__) in _SCRAMBLED:
            raise GraftError(
                f"{point}: {cls.__name__} holds its tokens window by window, not in the order of the image, so a "
                "spatial form cannot stand there; use a method for token models"
            )
    if len(shape) != 3 or anatomy.conv_dims() == 1:
        return Layout("N...C")
    return Layout("NLC", *_tokens(anatomy, point.path, shape[1]))


def _axis(anatomy: Anatomy, point: Point, shape: tuple[int, ...]) -> int:
    """The axis of the channels: that of the first layer in the block which works on a tensor of this shape."""
    own = _layer_axis(anatomy.module(point.path), shape)
    if own is not None:
        return own
    calls = anatomy.trace.calls if anatomy.trace else {}
    home = host = anatomy.block_of(point.path) or point.path
    while True:
        for path in (p for p in calls if not host or p.startswith(host + ".")):
            axis = (
                _layer_axis(anatomy.module(path), shape) if shape in (calls[path].input, calls[path].output) else None
            )
            if axis is not None:
                return axis
        if not host:
            break
        host = host.rpartition(".")[0]
    widths = {
        w
        for m in [anatomy.module(home), *(m for _, m in inner_modules(anatomy.module(home)))]
        for w in (in_channels(m), out_channels(m))
        if w
    }
    return -1 if len(shape) == 3 or (shape[-1] in widths and shape[1] not in widths) else 1


def _layer_axis(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """The channel axis of a layer's own tensor, None for what is no single layer."""
    if is_conv(module) or is_batchnorm(module) or isinstance(module, nn.GroupNorm):
        return 1
    if is_norm(module):
        first, last = shape[1] == in_channels(module), shape[-1] == in_channels(module)
        return channel_axis(module) if first == last else (1 if first else -1)
    return -1 if isinstance(module, nn.Linear) else None


def _tokens(anatomy: Anatomy, path: str, length: int) -> tuple[int, tuple[int, int] | None]:
    """(number of tokens before the grid, grid) of ``length`` tokens."""
    grids = list(dict.fromkeys(_grids(anatomy)))
    named = _named_prefix(anatomy, path)
    if named is not None:
        fitting = next((g for g in grids if g[0] * g[1] == length - named), None)
        if fitting is not None:
            return named, fitting
    close = [g for g in grids if 0 <= length - g[0] * g[1] <= _MOST_PREFIX]
    if close:
        best = max(close, key=lambda g: g[0] * g[1])
        return length - best[0] * best[1], best
    if named is not None:
        return named, None
    side = math.isqrt(length)
    return length - side * side, None


def _grids(anatomy: Anatomy) -> Iterator[tuple[int, int]]:
    """Grids that the tokens may stand on: what the model names, what its convolutions made, parts of the image."""
    for owner in _owners(anatomy, anatomy.stem or ""):
        for embed in (owner, getattr(owner, "patch_embed", None)):
            size = getattr(embed, "grid_size", None)
            if isinstance(size, (tuple, list)) and len(size) == 2:
                yield int(size[0]), int(size[1])
    if anatomy.trace is None:
        return
    for path, call in anatomy.trace.calls.items():
        if call.output is not None and len(call.output) == 4 and is_conv(anatomy.module(path)):
            yield call.output[2], call.output[3]
    image = anatomy.trace.input
    if image is not None and len(image) == 4:
        for stride in range(2, min(image[2:]) + 1):
            if image[2] % stride == 0 and image[3] % stride == 0:
                yield image[2] // stride, image[3] // stride


def _named_prefix(anatomy: Anatomy, path: str) -> int | None:
    for owner in _owners(anatomy, path):
        number = getattr(owner, "num_prefix_tokens", None)
        if isinstance(number, int):
            return number
    return None


def _owners(anatomy: Anatomy, path: str) -> Iterator[Any]:
    """The modules around ``path``, innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield anatomy.module(path)
