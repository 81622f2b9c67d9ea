"""SSF (Lian, Zhou, Feng and Wang, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
arXiv 2210.08823, NeurIPS 2022): a scale and a shift per channel behind every layer.

    y = s * x + t        s, t (C)    x: output of a linear layer, convolution or norm, before any activation

The channels are the last axis of what linear layers and layer norms return and the second of maps, by the kind of
the layer: the published code goes by size, and scales a map along its width where that equals C.

``sites="official"`` is where the published code has its pairs as run. ViT: the patch embedding, and norm1, qkv,
proj, norm2, fc1, fc2 of every block, and the final norm. Swin likewise, with the norm of the patch embedding.
ConvNeXt: the stem's convolution and norm, conv_dw, norm, fc1, fc2, and one pair on the last map before pooling.
Both without the layers between the stages. ``sites="all"`` has these too. Other networks: every linear layer,
convolution and norm but the classifier, with both. qkv is one pair of width 3d where it is one layer.

Parameters: two values per channel and site, 22 d per ViT block. ViT-B/16 205,824, Swin-B 267,264, ConvNeXt-B 255,232
(with ``sites="all"`` 205,824, 278,016 and 260,608), ResNet-50 106,240. Mergeable: into the layer's weight and bias,
which appears where there was none; not the pair on ConvNeXt's last map, nor the shift of a norm without a bias.

Start: s = 1, t = 0, the pretrained network. The published start (``init="official"``, ``preset="official"``) is
s ~ N(1, 0.02) and t ~ N(0, 0.02), so not an identity.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from ..core.anatomy import Anatomy, Site
from ..core.blocks import class_name
from ..core.layers import is_conv, is_norm, out_channels
from ..core.layout import layout_at
from ..core.method import Method, register
from ..core.placements import Affine, Placement, Point, Train, affine_for
from ..errors import GraftError

_SWIN = re.compile(r"Swin|AxialShift")
_CONVNEXT = re.compile(r"^(Conv[Nn]e[Xx]t|CNBlock)")
"""Block classes, in timm, torchvision and transformers."""


@register("ssf")
@dataclasses.dataclass(frozen=True)
class SSF(Method):
    """A scale and a shift per channel behind the layers of the network.

    Attributes:
        sites: ``"official"``: the layers that the published code has; ``"all"``: also those between the stages
            of Swin and ConvNeXt, which it misses by a slip.
        init: ``"identity"``: the network starts as the pretrained one; ``"official"``: as published.
        preset: ``"official"``: the published start and, on ConvNeXt, the norm of the classifier trained too, as
            the published code does by its name.
    """

    sites: Literal["official", "all"] = "official"
    init: Literal["identity", "official"] = "identity"
    preset: Literal["official"] | None = None

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One pair per site."""
        placed: list[Placement] = []
        for site in self._sites(anatomy):
            placed += _pairs(anatomy, site)
        placed += self._last_map(anatomy)
        if not placed:
            name = type(anatomy.model).__name__
            raise GraftError(f"ssf: {name} has no linear layer, convolution or norm that is selected and runs")
        if self.init == "official" or self.preset == "official":
            for pair in (p for p in placed if isinstance(p, Affine)):
                if pair.scale is not None:
                    nn.init.normal_(pair.scale, 1.0, 0.02)
                if pair.shift is not None:
                    nn.init.normal_(pair.shift, 0.0, 0.02)
        if self.preset == "official":
            placed += _head_norms(anatomy)
        return placed

    def _sites(self, anatomy: Anatomy) -> Iterator[Site]:
        """The layers with a pair behind them, in the order of the model."""
        tied = getattr(anatomy.model, "get_output_embeddings", lambda: None)()
        kind = _block_kind(anatomy)
        official = self.sites == "official" and bool(_SWIN.search(kind) or _CONVNEXT.search(kind))
        between = _between_blocks(anatomy) if official else set()
        after = _behind_pooling(anatomy) if _CONVNEXT.search(kind) else set()
        pooled = {"fc_norm"} if self.sites == "official" and _bare_norm(anatomy) else set()
        skipped = {*between, *after, *pooled, *anatomy.heads}
        for site in anatomy.sites:
            module = anatomy.module(site.path)
            if site.path not in skipped and module is not tied:
                yield site

    def _last_map(self, anatomy: Anatomy) -> list[Placement]:
        """The pair on the trunk's output where no norm of its own stands: it has no layer to fold into."""
        path = ""
        if _CONVNEXT.search(_block_kind(anatomy)) and not _is_norm_at(anatomy, "norm_pre"):
            path = anatomy.blocks[-1].path
        elif self.sites == "official" and _bare_norm(anatomy):
            path = "norm"
        if not path or not anatomy.selection(path, anatomy.address(path)):
            return []
        point = Point(path, "output")
        layout = layout_at(anatomy, point)
        width = anatomy.channels(point, layout)
        return [_pair(path, width, axis=1 if layout.name == "NC..." else -1, slot="last")]


def _pairs(anatomy: Anatomy, site: Site) -> list[Affine]:
    """The pairs behind one module: one for a layer, none for what is no layer or never used."""
    module = anatomy.module(site.path)
    if isinstance(module, nn.MultiheadAttention) and module._parameters.get("in_proj_weight") is not None:
        return [_pair(site.path, 3 * module.embed_dim, axis=-1, through=("in_proj_weight", "in_proj_bias"))]
    width = out_channels(module)
    several = any(p is not None and p.dim() > 1 for p in module._parameters.values())
    layer = is_conv(module) or isinstance(module, nn.Linear) or (is_norm(module) and not several)
    if not layer or width is None:
        return []
    if site.fires is False:
        return _through_the_weights(anatomy, site, width)
    return [affine_for(module, site.path, before_act=True)]


def _through_the_weights(anatomy: Anatomy, site: Site, width: int) -> list[Affine]:
    """The pairs of a layer that is never called: its parent reads its weight, or nobody does."""
    module = anatomy.module(site.path)
    weight = module._parameters.get("weight")
    if weight is None or anatomy.trace is None or not anatomy.trace.reads(weight):
        return []
    holder = site.path.rpartition(".")[0]
    biases = [name for name in ("q_bias", "v_bias") if anatomy.module(holder)._parameters.get(name) is not None]
    if module._parameters.get("bias") is not None or not biases:
        return [_pair(site.path, width, axis=-1, through=("weight", "bias"))]
    # BEiT, EVA and Swin V2 keep the biases of q and v beside their qkv; k has none, so it gets no shift.
    placed = []
    for i, letter in enumerate("qkv"):
        rows = slice(i * width // 3, (i + 1) * width // 3)
        pair = _pair(site.path, width // 3, axis=-1, rows=rows, through=("weight", None), slot=f"affine_{letter}")
        placed.append(pair)
        if f"{letter}_bias" in biases:
            # Scale and shift of the bias; the weight has the scale alone, and it is the same scale.
            bias = _pair(holder, width // 3, axis=-1, through=(None, f"{letter}_bias"), slot=f"affine_{letter}")
            bias.scale = pair.scale
            placed.append(bias)
        pair.shift = None
    return placed


def _pair(path: str, width: int, **options: object) -> Affine:
    return Affine(path, nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), **options)  # type: ignore[arg-type]


def _block_kind(anatomy: Anatomy) -> str:
    return anatomy.blocks[0].name if anatomy.blocks else ""


def _between_blocks(anatomy: Anatomy) -> set[str]:
    """The modules outside blocks that stand between the first and the last one."""
    order = list(anatomy.modules)
    first, last = order.index(anatomy.blocks[0].path), order.index(anatomy.blocks[-1].path)
    return {path for path in order[first:last] if anatomy.block_of(path) is None}


def _behind_pooling(anatomy: Anatomy) -> set[str]:
    """The modules behind the last block of a ConvNeXt, but for a norm before the pooling."""
    order = list(anatomy.modules)
    last = order.index(anatomy.blocks[-1].path)
    return {p for p in order[last:] if anatomy.block_of(p) is None and p != "norm_pre"}


def _bare_norm(anatomy: Anatomy) -> bool:
    """Whether this is a ViT that pools before its norm: the published pair stays before the pooling."""
    vit = class_name(anatomy.model).startswith("VisionTransformer")
    return vit and isinstance(anatomy.modules.get("norm"), nn.Identity) and _is_norm_at(anatomy, "fc_norm")


def _is_norm_at(anatomy: Anatomy, path: str) -> bool:
    return path in anatomy.modules and is_norm(anatomy.module(path))


def _head_norms(anatomy: Anatomy) -> list[Placement]:
    """The norms that the published code trains because their name contains ``head.``."""
    norms = [p for p, m in anatomy.modules.items() if "head." in p and is_norm(m)]
    chosen = [p for p in norms if anatomy.selection(p, anatomy.address(p))]
    return [Train(p, {n: t for n, t in anatomy.module(p)._parameters.items() if t is not None}) for p in chosen]
