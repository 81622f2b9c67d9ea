"""FacT (Jie and Deng, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", arXiv 2212.03145).

The changes of all weights of a transformer are one tensor of d x d matrices, 12 per layer: q, k, v, o, four blocks
of rows of fc1, four blocks of columns of fc2. The tensor is decomposed, and only its factors are trained. Row-vector
convention, U = ``u``^T (d, r) and V = ``v`` (d, r) shared by all, s = ``scale``, i counts the matrices:

    fact-tt    dW_i = s U S_i V^T                              S_i in ``s``, r x r for every matrix
    fact-tk    dW_i = s U (sum_t C[:, :, t] P[t, i]) V^T       C = ``c`` (r, r, r), P = ``p`` (r, 12 L), shared too

U and S start as ``nn.Linear`` does, C and P Xavier-uniform, V at zero, so the start is the pretrained network. In
training a dropout stands between S_i and V; not where a layer is never called (``nn.MultiheadAttention``, the qkv of
torchvision's Swin) and only its weight is seen. s acts like a factor of the learning rate.

One set of shared factors per width d, so per stage of Swin. An MLP of ratio m has m blocks where m is a whole number.
A weight that is not a row or column of d x d blocks (a gated MLP of ratio 8/3, a projection to another width) has no
place in the tensor and is left out. A fused weight is cut into blocks of d rows in its own order.

Parameters, with n matrices of width d: tt 2 d r + n r^2, tk 2 d r + n r + r^3. ViT-B/16: tt 8,448 (r = 4), 61,440
(r = 16); tk 13,952 (r = 8), 86,528 (r = 32). Swin-B: tt 135,168 (r = 16). Merged as W + dW.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import nn

from ..core.anatomy import Anatomy
from ..core.blocks import class_name
from ..core.layers import is_conv
from ..core.method import Method, register
from ..core.placements import Placement, WeightDelta
from ..errors import GraftError
from .forms.shared_factors import SharedFactors, TensorTrain, Tucker
from .forms.targets import Weight, weights

Target = Literal["qkv", "proj", "fc1", "fc2"]


@dataclasses.dataclass(frozen=True)
class _Slab:
    """A weight in the tensor: ``matrices`` blocks from number ``start`` on, of ``width`` rows and columns each."""

    weight: Weight
    shape: tuple[int, ...]
    role: str
    width: int
    matrices: int
    start: int = 0


@register("fact-tt")
@dataclasses.dataclass(frozen=True)
class FacTTT(Method):
    """Config of FacT in tensor-train form.

    Attributes:
        rank: r.
        scale: s; the paper chooses 0.01, 0.1, 1, 10 or 100 per task, and 10 is the median over VTAB.
        dropout: Between the inner factor and V.
        targets: Which weights are in the tensor: ``qkv`` (q, k and v), ``proj``, ``fc1``, ``fc2``.
    """

    rank: int = 16
    scale: float = 10.0
    dropout: float = 0.1
    targets: tuple[Target, ...] = ("qkv", "proj", "fc1", "fc2")

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise GraftError(f"{self.name}: rank={self.rank} is not valid; expected at least 1")
        if not 0 <= self.dropout < 1:
            raise GraftError(f"{self.name}: dropout={self.dropout} is not valid; expected at least 0 and below 1")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One form per weight, with the factors shared by all weights of a width."""
        slabs = self._slabs(anatomy)
        if not slabs:
            raise GraftError(
                f"{self.name}: {class_name(anatomy.model)} has no selected weight of an attention or MLP (targets "
                f"{', '.join(self.targets)}) that is made of square blocks; use lora, which takes weights of any shape"
            )
        placed: dict[int, Placement] = {}
        for width in {s.width: None for s in slabs}:
            own = [s for s in slabs if s.width == width]
            for slab, form in zip(own, self._forms(own), strict=True):
                where, name, called = slab.weight.path, slab.weight.parameter, slab.weight.called
                module = anatomy.module(where)
                placed[slabs.index(slab)] = WeightDelta.on(module, where, form, called=called, parameter=name)
        return [placed[i] for i in sorted(placed)]

    def _slabs(self, anatomy: Anatomy) -> list[_Slab]:
        """The selected weights that are a row or a column of square blocks, numbered per width in their order."""
        found: list[_Slab] = []
        count: dict[int, int] = {}
        for weight in weights(anatomy, self.targets, self.name):
            shape, module = tuple(weight.value(anatomy).shape), anatomy.module(weight.path)
            role = anatomy.site(weight.path).role
            width = shape[0] if role in ("attn.proj", "mlp.fc2") else shape[1]
            if shape[0] % width or shape[1] % width or math.prod(shape[2:]) > 1:
                continue
            if is_conv(module) and (module.groups != 1 or module.transposed):
                continue
            matrices = shape[0] * shape[1] // width**2
            found.append(_Slab(weight, shape, role, width, matrices, count.get(width, 0)))
            count[width] = count.get(width, 0) + matrices
        return found

    def _forms(self, slabs: list[_Slab]) -> list[SharedFactors]:
        """The forms of the weights of one width, which share U and V."""
        u, v = self._outer(slabs[0].width)
        return [TensorTrain(s.shape, u, v, self.scale, self.dropout) for s in slabs]

    def _outer(self, width: int) -> tuple[nn.Parameter, nn.Parameter]:
        u, v = nn.Parameter(torch.empty(self.rank, width)), nn.Parameter(torch.zeros(width, self.rank))
        nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        return u, v


@register("fact-tk")
@dataclasses.dataclass(frozen=True)
class FacTTK(FacTTT):
    """Config of FacT in Tucker form.

    Attributes:
        rank: r.
        scale: s; the paper chooses 0.01, 0.1, 1, 10 or 100 per task, and 10 is the median over VTAB.
        dropout: Between the inner factor and V.
        targets: Which weights are in the tensor: ``qkv`` (q, k and v), ``proj``, ``fc1``, ``fc2``.
        layout: How the blocks of an MLP are read from C and P: ``"official"``, as in the released code, whose
            reshape mixes them, or ``"paper"``. The published numbers come from the former.
    """

    rank: int = 32
    layout: Literal["official", "paper"] = "official"

    def _forms(self, slabs: list[_Slab]) -> list[SharedFactors]:
        u, v = self._outer(slabs[0].width)
        columns = sum(s.matrices for s in slabs)
        c = nn.Parameter(torch.empty(self.rank, self.rank, self.rank))
        p = nn.Parameter(torch.empty(self.rank, columns))
        nn.init.xavier_uniform_(c)
        nn.init.xavier_uniform_(p)
        reshaped = [self.layout == "official" and s.role.startswith("mlp") for s in slabs]
        return [
            Tucker(s.shape, u, v, self.scale, self.dropout, c=c, p=p, start=s.start, reshaped=mixed)
            for s, mixed in zip(slabs, reshaped, strict=True)
        ]
