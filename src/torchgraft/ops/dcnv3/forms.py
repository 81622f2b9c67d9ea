"""DCNv3 by operators that others provide: for export, and to compare with.

Equation of :mod:`.reference`. ``grid_sample`` exists in every exchange format; its coordinates are normalised, so where
they are integers rounding decides on which side it differentiates. ``deform_conv2d`` computes the same with another
order of points, and is slow in the backward on CPUs.
"""

from __future__ import annotations

import torch
import torchvision.ops
from torch import Tensor
from torch.nn import functional

from .geometry import Geometry
from .reference import accumulation_type, weights_of


def grid_sample(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """With ``torch.nn.functional.grid_sample``, all points at once; arguments as of :func:`.reference.dcnv3`."""
    n, height, width, channels = x.shape
    groups, points = geometry.groups, geometry.points
    kind = accumulation_type(x)
    weight = weights_of(mask, x, geometry, softmax)
    shift = offset.to(kind).unflatten(-1, (groups, points, 2))
    origin_y, origin_x = geometry.origins(height, width, shift)
    regular = torch.tensor(geometry.grid, dtype=kind, device=x.device)
    y = origin_y[:, None, None, None] + geometry.offset_scale * (regular[:, 0] + shift[..., 1])
    x_ = origin_x[:, None, None] + geometry.offset_scale * (regular[:, 1] + shift[..., 0])
    grid = torch.stack([(2 * x_ + 1) / width - 1, (2 * y + 1) / height - 1], -1)  # (N, Ho, Wo, G, P, 2)
    grid = grid.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(1, 2)
    maps = x.to(kind).unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    samples = functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weight = weight.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
    out = (samples * weight[:, None]).sum(-1)  # (N * G, D, Ho * Wo)
    size = geometry.size(height, width)
    return out.view(n, channels, *size).permute(0, 2, 3, 1).contiguous().to(x.dtype)


def torchvision_op(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """With ``torchvision.ops.deform_conv2d`` and a weight of ones; arguments as of :func:`.reference.dcnv3`."""
    channels, (rows, columns) = x.shape[3], geometry.kernel
    kind, scale = accumulation_type(x), geometry.offset_scale
    weight = weights_of(mask, x, geometry, softmax)
    shift = offset.to(kind).unflatten(-1, (geometry.groups, geometry.points, 2))
    # It scales nothing: what the scale does to the regular grid goes into the offsets.
    regular = torch.tensor(geometry.grid, dtype=kind, device=x.device).flip(-1)
    shift = scale * shift + (scale - 1) * regular
    if geometry.remove_center:
        centre = geometry.points // 2
        weight = torch.cat([weight[..., :centre], torch.zeros_like(weight[..., :1]), weight[..., centre:]], -1)
        shift = torch.cat([shift[..., :centre, :], torch.zeros_like(shift[..., :1, :]), shift[..., centre:, :]], -2)
    shift = shift.unflatten(-2, (columns, rows)).transpose(-2, -3).flip(-1).flatten(3).permute(0, 3, 1, 2)
    weight = weight.unflatten(-1, (columns, rows)).transpose(-1, -2).flatten(3).permute(0, 3, 1, 2)
    out = torchvision.ops.deform_conv2d(
        x.to(kind).permute(0, 3, 1, 2),
        shift,
        torch.ones(channels, 1, rows, columns, dtype=kind, device=x.device),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        mask=weight,
    )
    return out.permute(0, 2, 3, 1).contiguous().to(x.dtype)
