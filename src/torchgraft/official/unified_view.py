"""The code of "Towards a Unified View of Parameter-Efficient Transfer Learning" (jxhe/unify-parameter-efficient-tuning,
commit 3222ce2), on BART, mBART and RoBERTa of transformers.

Its modules stand under names with ``ef_`` in the layers and under ``prompt_model``. What was trained is told by a
checkpoint's keys, but not how it acts, so the options that the training script was given are needed: ``attn_option``,
``attn_composition``, ``ffn_option``, ``ffn_scale`` (its ``ffn_adapter_scalar``) and ``lora_alpha``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.blocks import class_name
from ..core.method import Combination, Method
from ..errors import GraftError
from ..methods.forms.prefix import Attended, attended
from ..methods.houlsby import Houlsby
from ..methods.lora import LoRA
from ..methods.mam import MAM
from ..methods.multihead_adapter import MultiheadAdapter
from ..methods.parallel_adapter import ParallelAdapter
from ..methods.pfeiffer import Pfeiffer
from ..methods.prefix import Prefix
from .base import Place, System, UnknownKeyError, register_system

_NET = re.compile(r"^prompt_model\.(wte|control_trans)(2|_enc|)\.(?:(0|2)\.)?(weight|bias)$")
_FREE = re.compile(r"^prompt_model\.(encoder|decoder_self|decoder_cross)_attn_(key|value)\.(\d+)\.weight$")
_ADAPTER = re.compile(r"^(.+)\.ef_(attn|ffn)_adapter\.(.+)$")
_LORA = re.compile(r"^(.+)\.ef_lora_([AB])$")
_NORM = re.compile(r"^(.+)\.ef_transform_layer_norm\.(weight|bias)$")
_NETS = {"": "decoder", "2": "cross", "_enc": "encoder"}
_KINDS = {"encoder": "encoder", "decoder_self": "decoder", "decoder_cross": "cross"}
_INSIDE = {"down_proj": "down", "up_proj": "up", "adapter_layer_norm_before": "norm", "scale": "scale"}
_PARTS = {None: "embedding", "0": "down", "2": "up"}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What the official script trains, by its own option names.

    Attributes:
        attn_mode: ``none``, ``prefix`` (with its net), ``prefix_nomlp``, ``adapter`` or ``lora``.
        attn_option: ``concat``, ``cross_attn_noln`` or ``cross_attn_relu`` of a prefix, ``sequential`` or
            ``parallel`` of an adapter.
        attn_composition: ``add`` or ``gate_add`` of a prefix whose softmax stands apart.
        attn_bottleneck: Length, width or rank.
        ffn_mode: ``none``, ``adapter`` or ``lora``.
        ffn_option: ``sequential``, ``parallel`` or ``pfeiffer``.
        ffn_bottleneck: Width or rank.
        ffn_scale: Factor of the parallel adapter.
        lora_alpha: LoRA multiplies by lora_alpha / rank.
        mid_dim: Middle width of the prefix net.
        normed: Whether ``cross_attn_relu`` reads a LayerNorm of its own (BART).
    """

    attn_mode: str = "none"
    attn_option: str | None = None
    attn_composition: str | None = None
    attn_bottleneck: int = 1
    ffn_mode: str = "none"
    ffn_option: str | None = None
    ffn_bottleneck: int = 1
    ffn_scale: float = 1.0
    lora_alpha: float = 1.0
    mid_dim: int = 800
    normed: bool = False

    def method(self) -> Method:
        """Our method.

        Raises:
            GraftError: The official code has no such combination, or ours has none that equals it.
        """
        prefix = self.attn_mode == "prefix" and self.attn_option == "concat"
        if prefix and (self.ffn_mode, self.ffn_option) == ("adapter", "parallel"):
            return MAM(
                length=self.attn_bottleneck,
                width=self.ffn_bottleneck,
                scale=self.ffn_scale,
                reparametrise=True,
                mid=self.mid_dim,
            )
        parts = [*self._attention(), *self._ffn()]
        if not parts:
            raise GraftError("unified_view: nothing is trained in attention or FFN; expected a mode other than 'none'")
        return parts[0] if len(parts) == 1 else Combination(tuple(parts))

    def _attention(self) -> list[Method]:
        width, option = self.attn_bottleneck, (self.attn_mode, self.attn_option, self.attn_composition)
        match option:
            case ("none", _, _):
                return []
            # The gate is the share of the prefix in one softmax over both (equation 7 of the paper).
            case ("prefix" | "prefix_nomlp", "concat", _) | ("prefix" | "prefix_nomlp", "cross_attn_noln", "gate_add"):
                return [self._prefix(gated=True)]
            case ("prefix" | "prefix_nomlp", "cross_attn_noln", "add"):
                return [self._prefix(gated=False)]
            case ("prefix_nomlp", "cross_attn_relu", "add"):
                return [MultiheadAdapter(length=width, norm=self.normed, init="official")]
            case ("adapter", "sequential", _):
                return [Houlsby(width=width, sites=("attn",), attn_layer_norm="in", init="bert")]
            case ("adapter", "parallel", _):
                return [ParallelAdapter(width=width, sites=("attn",), init="bert")]
            case ("lora", _, _):
                return [LoRA(rank=width, alpha=self.lora_alpha, targets=("q", "v"))]
        raise GraftError(f"unified_view: attn_mode, attn_option, attn_composition = {option} is no known combination")

    def _ffn(self) -> list[Method]:
        width = self.ffn_bottleneck
        match (self.ffn_mode, self.ffn_option):
            case ("none", _):
                return []
            case ("adapter", "parallel"):
                return [ParallelAdapter(width=width, scale=self.ffn_scale, init="bert")]
            case ("adapter", "sequential") if self.ffn_scale == 1:
                return [Houlsby(width=width, sites=("mlp",), init="bert")]
            case ("adapter", "pfeiffer") if self.ffn_scale == 1:
                return [Pfeiffer(width=width, reads="sum", init="bert")]
            case ("lora", _):
                return [LoRA(rank=width, alpha=self.lora_alpha, targets=("fc1", "fc2"))]
        raise GraftError(
            f"unified_view: ffn_mode={self.ffn_mode!r}, ffn_option={self.ffn_option!r}, ffn_scale={self.ffn_scale} is "
            "no known combination"
        )

    def _prefix(self, *, gated: bool) -> Method:
        net = self.attn_mode == "prefix"
        return Prefix(length=self.attn_bottleneck, gated=gated, reparametrise=net, mid=self.mid_dim if net else 800)


@register_system("unified_view")
class UnifiedViewCode(System):
    """BART, mBART and RoBERTa, whole or one layer (``layer.*``), with what their fork adds to attention and FFN."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.anatomy = Anatomy(model)
        self.attentions: dict[str, list[Attended]] = {}
        for site in attended(self.anatomy, "unified_view"):
            self.attentions.setdefault(self._kind(site), []).append(site)
        self.branches = {b.block: b for b in self.anatomy.branches("mlp")}
        self._keys = set(model.state_dict())
        self._mbart = any("MBart" in class_name(self.anatomy.module(b.path)) for b in self.anatomy.blocks)

    def method(self, state: Mapping[str, Tensor]) -> Method:
        """What the keys and shapes of the state and the options say."""
        read = {**_modes(state), **self.options}
        return Tuning(**read).method()

    def place(self, key: str) -> Place | None:
        """A part of the fork's modules, or the backbone under its own name."""
        key = self._whole(key)
        if match := _NET.match(key):
            home = self.attentions[_NETS[match[2]]][0].home
            name = _PARTS[match[3]]
            return Place("adapter", home, f"net.{name}" if name == "embedding" else f"net.{name}.{match[4]}")
        if match := _FREE.match(key):
            return Place("adapter", self.attentions[_KINDS[match[1]]][int(match[3])].home, f"{match[2]}s")
        if match := _NORM.match(key):
            return Place("adapter", match[1], f"norm.{match[2]}")
        if match := _LORA.match(key):
            return Place("adapter", match[1], "down" if match[2] == "A" else "up")
        if match := _ADAPTER.match(key):
            first, dot, rest = match[3].partition(".")
            path = match[1] if match[2] == "attn" else self._behind_ffn(match[1])
            return Place("adapter", path, f"{_INSIDE[first]}{dot}{rest}")
        if key not in self._keys:
            raise UnknownKeyError(key)
        path, _, leaf = key.rpartition(".")
        return Place("backbone", path, leaf)

    def is_dead(self, key: str) -> bool:
        """Prefixes of attentions that the model lacks, RoBERTa's second adapter, mBART's norm of the query."""
        if match := _NET.match(key):
            return _NETS[match[2]] not in self.attentions
        if match := _FREE.match(key):
            return _KINDS[match[1]] not in self.attentions
        return ".output.ef_ffn_adapter." in key or (self._mbart and _NORM.match(key) is not None)

    def num_classes(self, state: Mapping[str, Tensor]) -> int | None:
        """None: a classifier stays the host's own, as it does in the official code."""
        return None

    def _kind(self, site: Attended) -> str:
        """RoBERTa takes its prefixes from the net of decoders."""
        return "decoder" if site.home.endswith(".attention.self") else site.kind

    def _whole(self, key: str) -> str:
        key = key.removeprefix("seq2seq_model.")
        return f"{self.anatomy.blocks[0].path}.{key.removeprefix('layer.')}" if key.startswith("layer.") else key

    def _behind_ffn(self, block: str) -> str:
        """Where our adapter of this block's FFN lives."""
        if block not in self.branches:
            raise UnknownKeyError(f"{block}.ef_ffn_adapter")
        branch, option = self.branches[block], self.options.get("ffn_option")
        if option == "pfeiffer":
            return block
        return branch.adds.path if option == "parallel" else branch.returns.path


def _modes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The modes and sizes that the keys and shapes tell."""
    found: dict[str, Any] = {}
    for key, tensor in state.items():
        if (match := _NET.match(key)) and match[1] == "wte":
            found |= {"attn_mode": "prefix", "attn_bottleneck": tensor.shape[0]}
        elif match and match[3] == "0" and match[4] == "weight":
            found["mid_dim"] = tensor.shape[0]
        elif _FREE.match(key):
            found |= {"attn_mode": "prefix_nomlp", "attn_bottleneck": tensor.shape[0]}
        elif _NORM.match(key):
            found["normed"] = True
        elif (match := _LORA.match(key)) and match[2] == "A":
            where = "ffn" if match[1].rpartition(".")[2] in ("fc1", "fc2", "dense") else "attn"
            found |= {f"{where}_mode": "lora", f"{where}_bottleneck": tensor.shape[0]}
        elif (match := _ADAPTER.match(key)) and match[3] == "down_proj.weight":
            found |= {f"{match[2]}_mode": "adapter", f"{match[2]}_bottleneck": tensor.shape[0]}
    return found
