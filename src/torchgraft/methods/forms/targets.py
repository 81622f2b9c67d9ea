"""Which weights a method changes: queries, values, MLP layers, convolutions, named by their part in the block."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor, nn

from ...core.address import Selection
from ...core.anatomy import Anatomy, Site
from ...core.blocks import class_name
from ...core.layers import is_conv, out_channels
from ...core.placements import WeightDelta
from ...errors import GraftError

Part = Literal["auto", "all", "q", "k", "v", "qkv", "proj", "fc1", "fc2", "conv", "pointwise", "linear"]
"""What may be named as a target; see :func:`weights`."""
PARTS: tuple[str, ...] = get_args(Part)
LAYERS: tuple[Part, ...] = ("conv", "pointwise", "linear")
"""Between them, every weight of the blocks."""

_FUSED = {"attn.qkv": "qkv", "attn.kv": "kv", "attn.qk": "qk"}
_SINGLE = {"attn.q": "q", "attn.k": "k", "attn.v": "v"}
_ROLES = {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_UNLIKE = ("stem", "downsample", "head")
"""Roles of layers that belong to no block; they are changed only where ``include`` names them."""
_BY_HEAD = re.compile(r"(^|\.)(pwise|query_key_value)(\.|$)")
"""Names of fused layers whose output holds q, k and v of one head side by side, head after head."""
_WIDTHS = (("dim_out_qk", "dim_out_v"), ("qk_dim", "pdim"))
"""Attributes of attention modules whose values are not as wide as their queries and keys."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight, or a part of its rows.

    Attributes:
        path: Path of the module that holds it.
        parameter: Its name there.
        rows: The part of the first axis, None for all of it.
        called: Whether the dry run saw the module being called.
        part: What it is: ``q``, ``k``, ``v`` for rows of a fused weight, else ``delta``; names the placement.
    """

    path: str
    parameter: str
    rows: slice | None
    called: bool
    part: str = "delta"

    def value(self, anatomy: Anatomy) -> Tensor:
        """The weight, or its rows."""
        whole = anatomy.module(self.path)._parameters[self.parameter]
        assert whole is not None
        return whole if self.rows is None else whole[self.rows]

    def delta(self, anatomy: Anatomy, form: nn.Module) -> WeightDelta:
        """The placement of a change of this weight: beside its layer where that is possible, else on the weight."""
        return WeightDelta.on(
            anatomy.module(self.path),
            self.path,
            form,
            called=self.called,
            parameter=self.parameter,
            rows=self.rows,
            slot=self.part,
        )


def weights(
    anatomy: Anatomy,
    targets: Part | Iterable[Part],
    method: str,
    *,
    attention: Iterable[Part] = ("q", "v"),
    otherwise: Iterable[Part] = LAYERS,
    explicit: bool = True,
) -> list[Weight]:
    """The weights with these parts, in the order of the model; empty where there are none.

    Args:
        anatomy: The backbone.
        targets: One or several of: ``q``, ``k``, ``v`` (rows of the fused weight, or the separate layers);
            ``qkv`` (the fused weight as one, else the three layers); ``proj``; ``fc1`` (both halves of a gated
            MLP), ``fc2``; ``conv`` (convolutions with a kernel), ``pointwise`` (1x1 ones) and ``linear`` of the
            blocks, whatever part they play; ``all`` of these; ``auto``: see ``attention``.
        method: Name of the method, for errors.
        attention: What ``auto`` stands for on models with attention; a fused weight whose q, k and v cannot be
            told apart is taken as a whole.
        otherwise: What it stands for on the others.
        explicit: Take whole layers that ``include`` names exactly and that no target takes.

    Raises:
        GraftError: q, k and v of a fused weight are asked for but cannot be told apart.
    """
    asked: set[str] = {targets} if isinstance(targets, str) else set(targets)
    finder = _Finder(anatomy, method, "auto" in asked, explicit)
    if "auto" in asked:
        asked |= set(attention if finder.attends else otherwise)
    if "all" in asked:
        asked |= set(LAYERS)
    return [w for site in finder.sites for w in finder.at(site, asked)]


def nothing_found(anatomy: Anatomy, targets: Part | Iterable[Part], method: str) -> GraftError:
    """The error for targets that a model does not have."""
    named = targets if isinstance(targets, str) else ", ".join(targets)
    return GraftError(
        f"{method}: no weight for targets {named} is selected on {type(anatomy.model).__name__}; "
        "name other targets (q, k, v, qkv, proj, fc1, fc2, conv, pointwise, linear, all) or another selection"
    )


def matching(anatomy: Anatomy, patterns: Iterable[str]) -> set[str]:
    """The paths of the modules that paths, globs or addresses name; those that hold them do not count.

    Raises:
        GraftError: A pattern names no module.
    """
    listed = list(patterns)
    if not listed:
        return set()
    selection = Selection(listed, None, [len(s.blocks) for s in anatomy.stages])
    modules = [(p, anatomy.address(p)) for p in anatomy.modules]
    selection.check(modules)
    return {path for path, address in modules if selection(path, address)}


class _Finder:
    """The search on one model."""

    def __init__(self, anatomy: Anatomy, method: str, lenient: bool, explicit: bool) -> None:
        self.anatomy, self.method, self.lenient, self.explicit = anatomy, method, lenient, explicit
        self.sites = [*anatomy.sites, *self._attention_without_blocks()]
        self.attends = any(s.role in (*_FUSED, *_SINGLE) or self._holds_projections(s) for s in self.sites)

    def at(self, site: Site, asked: set[str]) -> list[Weight]:
        """The weights of one site."""
        module = self.anatomy.module(site.path)
        if self._holds_projections(site):
            return self._of_attention(site, module, asked)
        conv, linear = is_conv(module), isinstance(module, nn.Linear)
        if not (conv or linear) or not self._is_read(module, "weight"):
            return []
        pointwise = conv and max(site.kernel or ()) == 1
        whole = Weight(site.path, "weight", None, bool(site.fires))
        inside = (site.block is not None or not self.anatomy.blocks) and site.role not in _UNLIKE
        kinds = {"linear"} if linear else {"pointwise" if pointwise else "conv"}
        kinds |= {part for part, role in _ROLES.items() if site.role == role}
        kinds |= {_SINGLE[site.role], "qkv"} if site.role in _SINGLE else set()
        kinds |= {"qkv"} if site.role in _FUSED else set()
        if inside and kinds & asked:
            return [whole]
        parts = [p for p in _FUSED.get(site.role, "") if p in asked]
        if parts:
            slices = self._slices(site, module)
            if slices is not None:
                return [Weight(site.path, "weight", slices[p], bool(site.fires), p) for p in parts if p in slices]
            if self.lenient:
                return [whole]
            raise GraftError(
                f"{self.method}: {site.path!r} ({class_name(module)}) holds q, k and v in an order that is not known "
                "to be [q; k; v], so its rows cannot be told apart; use targets=qkv, which changes the whole of it"
            )
        named = self.explicit and self.anatomy.selection.explicit(site.path, site.address)
        return [whole] if named else []

    def _attention_without_blocks(self) -> list[Site]:
        """The attention modules of a model that has no blocks (a single block, say), where no site names them."""
        if self.anatomy.blocks:
            return []
        inside = [self.anatomy.site(p) for p, m in self.anatomy.modules.items() if isinstance(m, nn.MultiheadAttention)]
        return [s for s in inside if self.anatomy.selection(s.path, s.address)]

    def _holds_projections(self, site: Site) -> bool:
        """An attention module whose q, k and v are its own parameters, as in ``nn.MultiheadAttention``."""
        return isinstance(self.anatomy.module(site.path), nn.MultiheadAttention)

    def _of_attention(self, site: Site, module: nn.Module, asked: set[str]) -> list[Weight]:
        fused = module._parameters.get("in_proj_weight")
        if fused is None:
            names = {p: f"{p}_proj_weight" for p in "qkv" if asked & {p, "qkv", "linear"}}
            return [Weight(site.path, n, None, False, p) for p, n in names.items() if self._is_read(module, n)]
        if not self._is_read(module, "in_proj_weight"):
            return []
        if asked & {"qkv", "linear"}:
            return [Weight(site.path, "in_proj_weight", None, False, "qkv")]
        parts = _equal("qkv", fused.shape[0])
        return [Weight(site.path, "in_proj_weight", parts[p], False, p) for p in "qkv" if p in asked]

    def _slices(self, site: Site, layer: nn.Module) -> dict[str, slice] | None:
        """The rows of q, k and v in a fused layer; None where they are mixed or their widths are not known."""
        attention = self._attention_of(site)
        parts, rows = _FUSED[site.role], out_channels(layer) or 0
        if _BY_HEAD.search(site.path) or getattr(attention, "head_first", False) or hasattr(attention, "key_dim"):
            return None  # CoAtNet, MaxViT, LeViT, TinyViT, EfficientFormer, GPT-NeoX: head after head
        if re.search(r"LiteMLA|Lambda", class_name(attention)) or _shares_keys(attention):
            return None
        if getattr(attention, "use_global", False):
            parts = "kv"  # GCViT: the query comes from elsewhere
        for narrow, wide in _WIDTHS:
            if hasattr(attention, narrow) and hasattr(attention, wide):
                widths = [int(getattr(attention, wide if p == "v" else narrow)) for p in parts]
                return _slices(parts, widths) if sum(widths) == rows else None
        return None if rows % len(parts) else _equal(parts, rows)

    def _attention_of(self, site: Site) -> nn.Module:
        holders = [s.path for s in self.anatomy.inside(site.block or "", "attn")]
        path = next((h for h in holders if site.path.startswith(h + ".")), site.path.rpartition(".")[0])
        return self.anatomy.module(path)

    def _is_read(self, module: nn.Module, name: str) -> bool:
        """Whether the layer holds the weight and the forward uses it."""
        parameter = module._parameters.get(name)
        if parameter is None or not parameter.is_floating_point():
            return False
        return self.anatomy.trace is None or self.anatomy.trace.reads(parameter)


def _shares_keys(attention: nn.Module) -> bool:
    """Whether several queries share a key (grouped-query attention), so that the parts have unequal widths."""
    heads = getattr(attention, "num_heads", None)
    shared = getattr(attention, "num_key_value_heads", getattr(attention, "num_kv_heads", heads))
    return shared != heads


def _equal(parts: str, rows: int) -> dict[str, slice]:
    return _slices(parts, [rows // len(parts)] * len(parts))


def _slices(parts: str, widths: list[int]) -> dict[str, slice]:
    ends = [sum(widths[: i + 1]) for i in range(len(parts))]
    return {p: slice(end - width, end) for p, width, end in zip(parts, widths, ends, strict=True)}
