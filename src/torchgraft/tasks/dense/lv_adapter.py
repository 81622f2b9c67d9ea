"""LV-Adapter: adapters on the maps of a backbone, and class texts that every pixel reads.

A design after the ideas of "Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving", NeurIPS
2022, arXiv:2209.08953, of which no code was found. Published are the two ideas: multi-scale adapters that learn under
the losses of all tasks while the pretrained backbone is left alone, and a language-to-vision adapter whose
cross-attention brings embeddings of task-specific prompts into the maps. The equations are ours.

Adapter of a level, C channels, bottleneck r, s in R^C:

    x' = x + s up(GELU(dw(GELU(down(x)))))           up starts at zero, s at 1

Language to vision, for texts t (B, K, D), width e and H heads; queries are pixels, keys are class texts:

    q = W_q LN(x),  k = W_k LN(t),  v = W_v LN(t)
    w = softmax over the classes of q k^T / sqrt(e / H)          per pixel and head
    x' = x + gamma W_o(w v)                                      gamma in R^C, 1e-4 at the start
    score = <W_a x' / |W_a x'|, t / |t|> / tau                   (B, K, h, w)

The scores are trained to find the classes, each task's rows of them by the labels of that task, which aligns maps and
texts: cross-entropy for segmentation, binary cross-entropy inside the boxes for detection.

Parameters: 2 C r + 11 r + 2 C for the adapter of a level; 2 C e + 2 D e + 4 C + 2 D + C D + D for language to vision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ...errors import GraftError
from .box_loss import box_cross_entropy
from .pixel_loss import IGNORE_INDEX, pixel_cross_entropy

__all__ = [
    "ALIGNMENT_WEIGHT",
    "LanguageToVision",
    "LevelAdapter",
    "MultiScaleAdapter",
    "WithText",
    "alignment_loss",
    "box_alignment_loss",
    "default_bottleneck",
    "task_rows",
]

ALIGNMENT_WEIGHT = 0.4
"""Weight of the alignment losses beside those of the tasks; ours."""


class WithText(NamedTuple):
    """What language to vision returns.

    Attributes:
        output: x' (B, C, h, w).
        score: (B, K, h, w), divided by tau.
        attention: Mean over the heads (B, K, h, w); sums to 1 over the classes at every pixel.
    """

    output: Tensor
    score: Tensor
    attention: Tensor


def default_bottleneck(channels: int) -> int:
    """An eighth of the channels, at least 16."""
    return max(16, channels // 8)


class LevelAdapter(nn.Module):
    """The adapter of one level: a map (B, C, h, w) of any size to the same; returns its input at the start.

    Args:
        channels: C.
        bottleneck: Width r; default: :func:`default_bottleneck`.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: A number is below 1.
    """

    def __init__(self, channels: int, bottleneck: int | None = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        width = default_bottleneck(channels) if bottleneck is None else bottleneck
        if channels < 1 or width < 1:
            raise GraftError(f"LV-Adapter: channels={channels}, bottleneck={width}: each must be at least 1")
        dd = {"device": device, "dtype": dtype}
        self.channels = channels
        self.down = nn.Conv2d(channels, width, 1, **dd)
        self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width, **dd)
        self.up = nn.Conv2d(width, channels, 1, **dd)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1, **dd))
        for zero in (self.up.weight, self.up.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted map.

        Raises:
            GraftError: The map has another number of channels.
        """
        _check_map(x, self.channels)
        return x + self.scale * self.up(F.gelu(self.dw(F.gelu(self.down(x)))))


class MultiScaleAdapter(nn.Module):
    """One adapter per level.

    On the maps that a backbone returned, ``forward`` adapts them all and leaves the backbone alone; ``after_stage``
    adapts the output of one stage, where the next stage is to read it.

    Args:
        channels: Channels of every level.
        bottleneck: Width inside; default: :func:`default_bottleneck` of each.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: There is no level, or a number is below 1.
    """

    def __init__(
        self, channels: Sequence[int], bottleneck: int | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if not channels:
            raise GraftError("LV-Adapter: channels=[]: expected those of at least one level")
        self.levels = nn.ModuleList(LevelAdapter(width, bottleneck, device, dtype) for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, ``channels[i]``, h_i, w_i) to adapted maps.

        Raises:
            GraftError: The number of maps, or the channels of one, is another.
        """
        if len(maps) != len(self.levels):
            raise GraftError(f"LV-Adapter: {len(maps)} maps for {len(self.levels)} levels")
        return [level(found) for level, found in zip(self.levels, maps, strict=True)]

    def after_stage(self, index: int, x: Tensor) -> Tensor:
        """The adapted output of stage ``index``, counted from the first level.

        Raises:
            GraftError: There is no such level, or the map has another number of channels.
        """
        if not 0 <= index < len(self.levels):
            raise GraftError(f"LV-Adapter: stage {index}: there are the levels 0 to {len(self.levels) - 1}")
        return self.levels[index](x)


class LanguageToVision(nn.Module):
    """Brings class texts into a map of any size; the same module serves every level of a feature pyramid.

    Args:
        channels: C of the maps.
        text_dim: Width D of the texts.
        attention_dim: Width e inside.
        heads: H, which divides e.
        tau: Temperature of the scores.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: The heads do not divide the width, or the temperature is not positive.
    """

    def __init__(
        self,
        channels: int,
        text_dim: int,
        attention_dim: int = 128,
        heads: int = 8,
        tau: float = 0.07,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if heads < 1 or attention_dim % heads:
            raise GraftError(f"LV-Adapter: heads={heads} do not divide attention_dim={attention_dim}")
        if tau <= 0:
            raise GraftError(f"LV-Adapter: tau={tau}: expected a positive temperature")
        dd = {"device": device, "dtype": dtype}
        self.channels, self.text_dim, self.heads, self.tau = channels, text_dim, heads, tau
        self.nx = LayerNorm2d(channels, eps=1e-6, **dd)
        self.nt = nn.LayerNorm(text_dim, **dd)
        self.q = nn.Conv2d(channels, attention_dim, 1, bias=False, **dd)
        self.k = nn.Linear(text_dim, attention_dim, bias=False, **dd)
        self.v = nn.Linear(text_dim, attention_dim, bias=False, **dd)
        self.o = nn.Conv2d(attention_dim, channels, 1, **dd)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-4, **dd))
        self.align = nn.Conv2d(channels, text_dim, 1, **dd)

    def forward(self, x: Tensor, text: Tensor) -> WithText:
        """A map (B, C, h, w) and texts (K, D) or (B, K, D) to the map with their context, scores and attention.

        Raises:
            GraftError: A shape does not fit.
        """
        _check_map(x, self.channels)
        if text.dim() not in (2, 3) or text.shape[-1] != self.text_dim or (text.dim() == 3 and len(text) != len(x)):
            raise GraftError(
                f"LV-Adapter: texts {tuple(text.shape)} for {len(x)} images: expected (K, {self.text_dim}), "
                f"or (B, K, {self.text_dim}) with one set per image"
            )
        text = text.expand(len(x), -1, -1)
        normed = self.nt(text)
        query = self.q(self.nx(x)).unflatten(1, (self.heads, -1))  # (B, H, e / H, h, w)
        key, value = (part.unflatten(-1, (self.heads, -1)) for part in (self.k(normed), self.v(normed)))
        scores = torch.einsum("bnehw,bkne->bnkhw", query, key) / math.sqrt(query.shape[2])
        weights = scores.softmax(2)
        context = torch.einsum("bnkhw,bkne->bnehw", weights, value).flatten(1, 2)
        x = x + self.gamma[:, None, None] * self.o(context)
        aligned, directions = F.normalize(self.align(x), dim=1), F.normalize(text, dim=-1)
        return WithText(x, torch.einsum("bdhw,bkd->bkhw", aligned, directions) / self.tau, weights.mean(1))


def task_rows(classes: Sequence[int]) -> list[slice]:
    """Where the texts of every task stand when they are concatenated.

    Tasks that share a name, as a car to detect and a car to segment, keep a row each: their prompts differ.

    Args:
        classes: Number of classes of every task.
    """
    ends = [sum(classes[: i + 1]) for i in range(len(classes))]
    return [slice(end - count, end) for end, count in zip(ends, classes, strict=True)]


def alignment_loss(score: Tensor, labels: Tensor, rows: slice, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The cross-entropy of one segmentation task's rows of the scores, upsampled to the labels.

    An image without labels of the task has ``ignore_index`` everywhere; a batch of such images gives exactly 0.

    Args:
        score: (B, K, h, w) of all tasks.
        labels: Integers (B, H, W): classes of this task, counted from 0.
        rows: Rows of this task, see :func:`task_rows`.
        ignore_index: Label of the pixels that do not count.

    Raises:
        GraftError: There are no such rows, or the shapes do not belong together.
    """
    return pixel_cross_entropy(_task(score, rows), labels, ignore_index=ignore_index)


def box_alignment_loss(
    score: Tensor, boxes: Sequence[Tensor], classes: Sequence[Tensor], rows: slice, *, stride: int = 4
) -> Tensor:
    """The binary cross-entropy inside the boxes of the detection task's rows of the scores.

    An image without labels of the task has no boxes; a batch of such images gives exactly 0.

    Args:
        score: (B, K, h, w) of all tasks.
        boxes: For every image x1, y1, x2, y2 in pixels (n, 4).
        classes: For every image the classes of this task (n,), counted from 0.
        rows: Rows of this task, see :func:`task_rows`.
        stride: Pixels per cell of the scores.

    Raises:
        GraftError: There are no such rows, or boxes, classes and scores do not belong together.
    """
    return box_cross_entropy(_task(score, rows), boxes, classes, stride=stride)


def _task(score: Tensor, rows: slice) -> Tensor:
    if not 0 <= rows.start < rows.stop <= score.shape[1]:
        raise GraftError(f"LV-Adapter: rows {rows.start} to {rows.stop} of {score.shape[1]} classes")
    return score[:, rows]


def _check_map(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise GraftError(f"LV-Adapter: a tensor {tuple(x.shape)}: expected a map (B, {channels}, h, w)")
