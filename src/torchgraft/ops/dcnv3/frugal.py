"""DCNv3 in PyTorch without a kernel of its own: points one after the other, so that no sample is kept.

Equation of :mod:`.reference`. The forward is one weighted ``embedding_bag`` per point, which reads the corners without
writing them down; the backward computes positions again. Apart from results, one point's corners are alive at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import Geometry
from .reference import cells, corner_weights, rows_of, weights_of


def forward(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """The output, (N, Ho, Wo, C); arguments as of :func:`.reference.dcnv3`."""
    rows, weight = rows_of(x, geometry), weights_of(mask, x, geometry, softmax)
    out: Tensor | None = None
    for t in range(geometry.points):
        at, part_y, part_x = cells(x, offset, geometry, t)
        corners = corner_weights(part_y, part_x, weight[..., t])
        samples = torch.nn.functional.embedding_bag(
            at.view(-1, 4), rows, per_sample_weights=corners.view(-1, 4), mode="sum"
        )
        out = samples if out is None else out.add_(samples)
    assert out is not None
    return out.view(*weight.shape[:3], -1).to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, offset and mask that are wanted, each in the type of its tensor.

    Args:
        grad: (N, Ho, Wo, C), gradient of the output.
        x: See :func:`.reference.dcnv3`.
        offset: See there.
        mask: See there.
        geometry: See there.
        softmax: See there.
        wanted: Which of the three.
    """
    rows, weight = rows_of(x, geometry), weights_of(mask, x, geometry, softmax)
    given = grad.to(rows.dtype).reshape(-1, rows.shape[1])
    of_rows = torch.zeros_like(rows) if wanted[0] else None
    of_offset = rows.new_empty(*weight.shape, 2) if wanted[1] else None
    of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[2] else None
    for t in range(geometry.points):
        at, part_y, part_x = cells(x, offset, geometry, t)
        if of_rows is not None:
            corners = corner_weights(part_y, part_x, weight[..., t])
            for corner in range(4):
                of_rows.index_add_(0, at[..., corner].reshape(-1), given * corners[..., corner].reshape(-1, 1))
        if of_offset is None and of_weight is None:
            continue
        # The products of the gradient with the four corners; what is interpolated between them are numbers.
        (above, above_right), (below, below_right) = (
            [(rows.index_select(0, at[..., k].reshape(-1)) * given).sum(-1).view_as(part_y) for k in pair]
            for pair in ((0, 1), (2, 3))
        )
        step_above, step_below = above_right - above, below_right - below
        value_above = above + part_x * step_above
        step_down = below + part_x * step_below - value_above
        if of_weight is not None:
            of_weight[..., t] = value_above + part_y * step_down
        if of_offset is not None:
            factor = geometry.offset_scale * weight[..., t]
            of_offset[..., t, 0] = factor * (step_above + part_y * (step_below - step_above))
            of_offset[..., t, 1] = factor * step_down
    if of_weight is not None and softmax:
        of_weight = weight * (of_weight - (weight * of_weight).sum(-1, keepdim=True))
    return (
        None if of_rows is None else _map_of(of_rows, x).to(x.dtype),
        None if of_offset is None else of_offset.view(offset.shape).to(offset.dtype),
        None if of_weight is None else of_weight.view(mask.shape).to(mask.dtype),
    )


def _map_of(rows: Tensor, x: Tensor) -> Tensor:
    """What :func:`.reference.rows_of` made rows of, (N, H, W, C)."""
    n, height, width, channels = x.shape
    return rows.view(n, height + 3, width + 3, channels)[:, 2:-1, 2:-1].contiguous()
