"""BitFit (Ben Zaken, Goldberg and Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models", arXiv 2106.10199, ACL 2022): the biases alone.

    y = W x + b        every bias b trains, as a copy of the adapter

A bias is a parameter called ``bias``, or a vector called ``..._bias`` that a module holds for its fused
projections (``q_bias`` of BEiT, ``in_proj_bias`` of ``nn.MultiheadAttention``). Tables of relative position
biases are something else and train only with ``tables=True``, as in code that goes by names.

ConvNets have few biases beside those of their norms. ``create=True`` adds one to every bias-free convolution
inside a block, but not to the block's shortcut, as the published Conv-Adapter code does in its mode "bias"
(commit 97e1fc8; ResNet-50: 22,656 more). They start at zero.

Parameters: 11 d per ViT block of width d, norms included. ViT-B/16 102,912, ResNet-50 26,560, Swin-B 137,216
(200,760 with tables). Mergeable: it is the bias. Start: the pretrained network.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..core.anatomy import Anatomy
from ..core.layers import channel_axis, out_channels
from ..core.method import Method, register
from ..core.placements import Affine, Placement
from ..errors import GraftError
from .forms import copies

SHORTCUTS = ("downsample", "shortcut")
"""Names of a residual block's shortcut in timm, torchvision and transformers."""


@register("bitfit")
@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """Config of BitFit.

    Attributes:
        tables: Also train tables of relative position biases (Swin, BEiT, LeViT).
        create: Also give a bias to the bias-free convolutions inside blocks.
    """

    tables: bool = False
    create: bool = False

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A copy of every bias, and the created ones."""
        placed: list[Placement] = [*copies(anatomy, self._is_bias)]
        if self.create:
            placed += self._created(anatomy)
        if not placed:
            hint = "another method" if self.create else "bitfit[create=true], which adds biases to convolutions"
            raise GraftError(f"bitfit: no bias is selected on {type(anatomy.model).__name__}; use {hint}")
        return placed

    def _is_bias(self, path: str, module: nn.Module, name: str) -> bool:
        if name == "bias":
            return True
        vector = module._parameters[name].dim() == 1  # type: ignore[union-attr]
        if vector:
            return name.endswith("_bias")
        return self.tables and "bias" in name

    def _created(self, anatomy: Anatomy) -> list[Placement]:
        """A shift behind every bias-free convolution of a block (of the model, where it has no blocks)."""
        placed: list[Placement] = []
        for site in anatomy.find("spatial_conv", "conv"):
            conv = anatomy.module(site.path)
            outside = site.block is None and bool(anatomy.blocks)
            shortcut = any(part in SHORTCUTS for part in site.path.removeprefix(f"{site.block}.").split("."))
            if conv._parameters.get("bias") is None and not outside and not shortcut and site.fires is not False:
                shift = nn.Parameter(torch.zeros(out_channels(conv) or 0))
                placed.append(Affine(site.path, None, shift, axis=channel_axis(conv), slot="bias"))
        return placed
