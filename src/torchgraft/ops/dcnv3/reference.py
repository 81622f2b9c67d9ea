"""DCNv3 in plain PyTorch: the definition that every other backend is tested against.

Per output pixel (h, w), group g and point t of the P points of the kernel, in pixels of the image without padding::

    p_y = h stride - padding + c + scale (j dilation - c + dy)        c = dilation (kernel - 1) // 2
    p_x = w stride - padding + c + scale (i dilation - c + dx)        t = i kernel + j
    y[n, h, w, g, :] = sum_t mask[n, h, w, g, t] bilinear(x[n, :, :, g, :], p_y, p_x)

x (N, H, W, C), offset (N, Ho, Wo, G P 2) with (dx, dy) last, mask (N, Ho, Wo, G P) -> (N, Ho, Wo, C). What lies outside
of the image is zero; a coordinate that is no number lies outside. The cell of a sample is found with floor, so that the
derivative at an integer is the one to the right. The published initialisation makes every coordinate an integer, and
coordinates that are first normalised, as ``grid_sample`` wants them, fall on either side there.

Source: "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", arXiv:2211.05778.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry


def dcnv3(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """The operator. Autograd differentiates it as often as asked, and keeps every sample for that.

    Args:
        x: (N, H, W, C).
        offset: (N, Ho, Wo, G * P * 2), (dx, dy) in pixels, before the scale.
        mask: (N, Ho, Wo, G * P), weights of the points, or their logits with ``softmax``.
        geometry: Kernel, stride and so on.
        softmax: Whether ``mask`` still has to be normalised over the P points.

    Returns:
        (N, Ho, Wo, C) in the type of ``x``; 16-bit inputs are computed in float32.
    """
    rows, weight = rows_of(x, geometry), weights_of(mask, x, geometry, softmax)
    out = rows.new_zeros(*weight.shape[:-1], rows.shape[1])
    for t in range(geometry.points):
        at, part_y, part_x = cells(x, offset, geometry, t)
        corners = corner_weights(part_y, part_x, weight[..., t])
        out = out + (rows[at] * corners[..., None]).sum(-2)
    return out.flatten(3).to(x.dtype)


def accumulation_type(x: Tensor) -> torch.dtype:
    """The type in which an input of this type is computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(x: Tensor, geometry: Geometry) -> Tensor:
    """(N * (H + 3) * (W + 3) * G, D): the channels of every group of every pixel, in a frame of zeros.

    Two rows and columns before the map and one after it: what lies outside is read there, without a case of its own.
    """
    frame = torch.nn.functional.pad(x.to(accumulation_type(x)), (0, 0, 2, 1, 2, 1))
    return frame.reshape(-1, x.shape[3] // geometry.groups)


def weights_of(mask: Tensor, x: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """(N, Ho, Wo, G, P): the weight of every point."""
    mask = mask.to(accumulation_type(x)).unflatten(-1, (geometry.groups, geometry.points))
    return mask.softmax(-1) if softmax else mask


def cells(x: Tensor, offset: Tensor, geometry: Geometry, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where point t samples.

    Returns:
        (N, Ho, Wo, G, 4): which rows of :func:`rows_of` are the corners above left, above right, below left and below
        right; twice (N, Ho, Wo, G): how far below and right of the first the sample is, in [0, 1).
    """
    n, height, width, _ = x.shape
    groups, scale = geometry.groups, geometry.offset_scale
    shift = offset.unflatten(-1, (groups, geometry.points, 2))[..., t, :].to(accumulation_type(x))
    (grid_y, grid_x), (origin_y, origin_x) = geometry.grid[t], geometry.origins(height, width, shift)
    low_y, part_y = _split(origin_y[:, None, None] + scale * (grid_y + shift[..., 1]), height)
    low_x, part_x = _split(origin_x[:, None] + scale * (grid_x + shift[..., 0]), width)
    image = torch.arange(n, device=x.device)[:, None, None, None] * (height + 3)
    group = torch.arange(groups, device=x.device)
    first = ((image + (low_y + 2)) * (width + 3) + (low_x + 2)) * groups + group
    down = (width + 3) * groups
    return first[..., None] + torch.tensor([0, groups, down, down + groups], device=x.device), part_y, part_x


def corner_weights(part_y: Tensor, part_x: Tensor, weight: Tensor) -> Tensor:
    """(N, Ho, Wo, G, 4): the bilinear weights of the corners times the weight of the point."""
    above, below = weight * (1 - part_y), weight * part_y
    return torch.stack([above * (1 - part_x), above * part_x, below * (1 - part_x), below * part_x], -1)


def _split(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The integer below a coordinate and what is left; -2 and 0 for what lies outside."""
    position = position.masked_fill(~((position >= -1) & (position < size)), -2)
    low = position.detach().floor()
    return low.long(), position - low
