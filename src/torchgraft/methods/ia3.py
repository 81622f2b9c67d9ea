"""(IA)^3 (Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv 2205.05638, NeurIPS 2022): one learned factor per channel of the keys, the values and the MLP's hidden layer.

    softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)         l_k, l_v: scales of the outputs of k and v
    (l_ff * act(x W_1)) W_2                            l_ff: scale of the input of fc2

Keys and values are rows of a fused projection or layers of their own. A fused one that holds its heads side by side
(CoAtNet, LeViT) is scaled as a whole: a factor on q does what the same factor on k does. In the models without
attention the output of every convolution with a kernel is scaled, and the input of fc2 where there is one. That is
HF peft's rule for convolutions: the input of a feed-forward layer, the output of any other.

A scaled output includes the bias, also where the attention module keeps it (BEiT, EVA, Swin V2). Start: all ones, the
pretrained network. Mergeable: outputs into the rows of the weight and into the bias, inputs into its columns.

Parameters: 2 d + 4 d per ViT block of width d with an MLP of 4 d. ViT-B/16: 55,296.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..core.anatomy import Anatomy
from ..core.layers import channel_axis, in_channels, out_channels
from ..core.method import Method, register
from ..core.placements import Affine, Placement
from ..errors import GraftError
from .forms.targets import PARTS, Part, Weight, matching, nothing_found, weights


@register("ia3")
@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Config of (IA)^3.

    Attributes:
        targets: Whose outputs are scaled: ``auto``, or one or several of ``q``, ``k``, ``v``, ``qkv`` (a fused weight
            as one), ``proj``, ``fc1``, ``fc2``, ``conv``, ``pointwise``, ``linear``, ``all``.
        feedforward: Whose inputs are scaled instead: parts as above, or modules by path, glob or address.
    """

    targets: Part | tuple[Part, ...] = "auto"
    feedforward: tuple[str, ...] = ("fc2",)

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One scale per weight."""
        outputs = weights(anatomy, self.targets, self.name, attention=("k", "v"), otherwise=("conv",))
        inputs = self._inputs(anatomy, outputs)
        first = {w.path for w in inputs}
        placed: list[Placement] = [_of_input(anatomy, w) for w in inputs]
        for weight in outputs:
            placed += [] if weight.path in first else _of_output(anatomy, weight)
        if not placed:
            raise nothing_found(anatomy, self.targets, self.name)
        return placed

    def _inputs(self, anatomy: Anatomy, outputs: Iterable[Weight]) -> list[Weight]:
        """The weights whose inputs are scaled: by their part, or those of ``outputs`` that are named."""
        parts: list[Any] = [f for f in self.feedforward if f in PARTS]
        found = weights(anatomy, parts, self.name, explicit=False)
        named = matching(anatomy, [f for f in self.feedforward if f not in PARTS])
        return [*found, *(w for w in outputs if w.path in named and w not in found)]


def _of_input(anatomy: Anatomy, weight: Weight) -> Affine:
    """The scale of what a layer reads; of the columns of its weight where it is never called."""
    layer = anatomy.module(weight.path)
    ones, axis = nn.Parameter(torch.ones(in_channels(layer) or 0)), channel_axis(layer)
    through = None if weight.called else (weight.parameter, None)
    return Affine(weight.path, ones, None, axis=axis, side="input", through=through, slot="input")


def _of_output(anatomy: Anatomy, weight: Weight) -> list[Affine]:
    """The scale of what a layer returns; of the rows of its weight and bias where it is never called."""
    layer = anatomy.module(weight.path)
    whole = weight.rows is None and weight.parameter == "weight"
    ones = nn.Parameter(torch.ones((whole and out_channels(layer)) or weight.value(anatomy).shape[0]))
    slot = "scale" if weight.part == "delta" else weight.part
    if weight.called:
        return [Affine(weight.path, ones, None, axis=channel_axis(layer), rows=weight.rows, slot=slot)]
    home, bias, rows = _bias(anatomy, weight)
    together = (home, rows) == (weight.path, weight.rows)
    through = (weight.parameter, bias if together else None)
    placed = [Affine(weight.path, ones, None, axis=-1, rows=weight.rows, through=through, slot=slot)]
    if bias is not None and not together:
        placed.append(Affine(home, ones, None, axis=-1, rows=rows, through=(None, bias), slot=f"{slot}_bias"))
    return placed


def _bias(anatomy: Anatomy, weight: Weight) -> tuple[str, str | None, slice | None]:
    """Where the bias of a layer that is never called is kept: module, name (None: nowhere), rows."""
    layer, holder = anatomy.module(weight.path), weight.path.rpartition(".")[0]
    if layer._parameters.get("bias") is not None:
        return weight.path, "bias", weight.rows
    if isinstance(layer, nn.MultiheadAttention):
        name = "in_proj_bias" if layer.in_proj_bias is not None else None
        start = "qkv".find(weight.part) * layer.embed_dim
        apart = weight.parameter != "in_proj_weight"
        return weight.path, name, slice(start, start + layer.embed_dim) if apart else weight.rows
    beside = anatomy.module(holder)._parameters
    if weight.rows is None and beside.get("v_bias") is not None:
        raise GraftError(
            f"ia3: the biases of {weight.path!r} are kept apart for q, k and v, so it cannot be scaled as a whole; "
            "use targets=[q, k, v]"
        )
    name = f"{weight.part}_bias"
    return holder, name if beside.get(name) is not None else None, None
