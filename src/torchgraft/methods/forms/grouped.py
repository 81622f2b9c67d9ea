"""A convolution with as many groups as outputs, computed as a depthwise one and a sum over each group.

The result is the same up to rounding (about 1e-6 relative). PyTorch's CPU kernels for a few channels a group are slow:
forward and backward of the two steps take 0.2 to 0.9 of their time (``python benchmarks/grouped_convolution.py``). With
the channels stored last that holds for small weights on maps that are not small; beyond, PyTorch's depthwise kernel is
slow. Which way is taken depends on shapes only, so that equal runs have equal bits. On other devices, and in exported
graphs, the convolution stays one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...core.layers import ConvGeometry
from ...swap import swap


class SumsGroups:
    """In front of such a convolution."""

    swap_rank = 9
    """Innermost: what lean layers do about its input, they do around this."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C_in, *space) -> (N, groups, *space')."""
        if x.device.type != "cpu" or torch.compiler.is_exporting() or not _pays(self, x):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        weight, bias = self.weight, self.bias
        geometry: ConvGeometry = self.__dict__["_geometry"]
        inputs = self.in_channels
        y = geometry.apply(x, weight.reshape(inputs, 1, *weight.shape[2:]), inputs)
        y = y.unflatten(1, weight.shape[:2]).sum(2)
        return y if bias is None else y + bias.view(-1, *[1] * geometry.dims)


def _pays(conv: Any, x: Tensor) -> bool:
    """Whether two steps are faster; the two limits separate the shapes of the benchmark."""
    if x.dim() != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return True
    elements = conv.weight.numel()
    positions = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    return bool(elements <= 20_000 and elements <= 80 * positions)


def sum_groups(conv: _ConvNd) -> _ConvNd:
    """Let ``conv`` compute as a depthwise convolution and a sum, where it has one output and several inputs a group."""
    single = conv.groups == conv.out_channels and conv.in_channels > conv.groups
    if single and not conv.transposed and isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        conv.__dict__["_geometry"] = ConvGeometry.of(conv)
        swap(conv, SumsGroups)
    return conv
