"""Learned keys and values of attention: free ones, ones that a net computes while they are trained, and their sites."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.anatomy import Anatomy
from ...core.attention import why_no_core
from ...core.branches import Branch, branches_of
from ...core.layers import out_channels
from ...core.method import Combination, Method
from ...core.placements import KeyValue
from ...core.placements.key_value import Compose
from ...errors import GraftError


class FreePrefix(nn.Module):
    """P_k and P_v as they are.

    Shapes: () -> (l, keys), (l, values). Parameters: ``l (keys + values)``, N(0, 0.02).

    Args:
        length: l.
        keys: Width of a key, all heads together.
        values: Width of a value, all heads together.
    """

    def __init__(self, length: int, keys: int, values: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(length, keys).normal_(std=0.02))
        self.values = nn.Parameter(torch.empty(length, values).normal_(std=0.02))

    def forward(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v."""
        return self.keys, self.values


class PrefixNet(nn.Module):
    """``up(tanh(down(embedding)))``: the prefixes of several attentions at once.

    Shapes: () -> (l, out). Parameters: ``l d + (d + 1) mid + (mid + 1) out``; the embedding N(0, 1), the layers as
    PyTorch starts them.

    Args:
        length: l.
        d: Width of the embedding.
        mid: Width between the two layers.
        out: Keys and values of every attention together.
    """

    def __init__(self, length: int, d: int, mid: int, out: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(length, d).normal_())
        self.down, self.up = nn.Linear(d, mid), nn.Linear(mid, out)


class NetPrefix(nn.Module):
    """P_k and P_v of one attention as a part of what a shared net computes; only that part is computed.

    Shapes: () -> (l, keys), (l, values). Parameters: those of the net, once for all attentions that share it.

    Args:
        net: The shared net.
        start: Where this attention's columns begin in the net's output: keys, then values.
        keys: Width of a key, all heads together.
        values: Width of a value, all heads together.
    """

    def __init__(self, net: PrefixNet, start: int, keys: int, values: int) -> None:
        super().__init__()
        self.net, self.start, self.widths = net, start, (keys, values)

    def forward(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v."""
        rows = slice(self.start, self.start + sum(self.widths))
        hidden = self.net.down(self.net.embedding).tanh()
        keys, values = F.linear(hidden, self.net.up.weight[rows], self.net.up.bias[rows]).split(self.widths, -1)
        return keys, values

    @torch.no_grad()
    def free(self) -> FreePrefix:
        """The same keys and values without the net."""
        keys, values = self()
        form = FreePrefix(len(keys), *self.widths).to(keys)
        form.keys.copy_(keys)
        form.values.copy_(values)
        return form


@dataclasses.dataclass(frozen=True)
class Attended:
    """An attention module that can take keys and values.

    Attributes:
        home: Its path.
        branch: The residual branch it belongs to.
        kind: ``encoder``, ``decoder`` or ``cross``: the prefixes of one kind come from one net.
        keys: Width of its keys, all heads together.
        values: Width of its values.
    """

    home: str
    branch: Branch
    kind: str
    keys: int
    values: int


def attended(anatomy: Anatomy, method: str) -> list[Attended]:
    """Every selected attention module of the blocks, in the order in which they run.

    Raises:
        GraftError: There is none, or one of them can take no further keys.
    """
    branches = [b for block in anatomy.blocks for b in branches_of(anatomy, block.path) if b.kind in ("attn", "cross")]
    chosen = [b for b in branches if b.module and anatomy.selection(b.module, anatomy.address(b.module))]
    if not chosen:
        raise GraftError(
            f"{method}: no attention of {type(anatomy.model).__name__} is selected, so there are no keys and values to "
            "add to; use conv-adapter on a ConvNet"
        )
    return [_attended(anatomy, branch, method) for branch in chosen]


def key_values(
    anatomy: Anatomy, method: str, length: int, *, compose: Compose = "joint", mid: int | None = None
) -> list[KeyValue]:
    """Learned keys and values at every selected attention.

    Args:
        anatomy: The backbone.
        method: Name of the method, for errors.
        length: l.
        compose: How they are joined with the attention's own (:class:`~torchgraft.core.placements.KeyValue`).
        mid: Middle width of the nets that compute them, one for every kind of attention; None: they are free.
    """
    sites = attended(anatomy, method)
    forms: list[nn.Module] = [FreePrefix(length, s.keys, s.values) for s in sites] if mid is None else []
    if mid is not None:
        nets = {s.kind: [t for t in sites if t.kind == s.kind] for s in sites}
        built = {k: PrefixNet(length, g[0].keys, mid, sum(t.keys + t.values for t in g)) for k, g in nets.items()}
        for site in sites:
            ahead = nets[site.kind][: nets[site.kind].index(site)]
            forms.append(NetPrefix(built[site.kind], sum(t.keys + t.values for t in ahead), site.keys, site.values))
    return [
        KeyValue(form, s.home, anatomy.module(s.home), compose=compose, slot="prefix")
        for s, form in zip(sites, forms, strict=True)
    ]


def finalise(adapter: Adapter) -> None:
    """Compute the prefixes of a trained adapter once and drop the nets; its outputs stay what they are.

    What is saved from then on is P_k and P_v, and the adapter is one whose method has ``reparametrise=False``. An
    optimiser that was made before holds parameters that no longer act.
    """
    for _, placement in adapter.placements:
        if isinstance(placement, KeyValue) and isinstance(placement.form, NetPrefix):
            placement.form = placement.form.free()
    adapter.method = _without_net(adapter.method)


def _without_net(method: Method) -> Method:
    if isinstance(method, Combination):
        return Combination(tuple(_without_net(part) for part in method.parts))
    return dataclasses.replace(method, reparametrise=False) if hasattr(method, "reparametrise") else method  # type: ignore[call-arg]


def _attended(anatomy: Anatomy, branch: Branch, method: str) -> Attended:
    assert branch.module is not None
    layer = branch.first[0] if branch.first else f"{branch.module}."
    home = layer.rpartition(".")[0]
    while home != branch.module and why_no_core(anatomy.module(home)) is not None:
        home = home.rpartition(".")[0]  # a layer may stand in a holder of its own
    reason = why_no_core(anatomy.module(home))
    if reason is not None:
        raise GraftError(f"{method}: attention {home!r} cannot take further keys and values: {reason}")
    widths = _widths(anatomy, branch, home)
    if widths is None:
        raise GraftError(f"{method}: the width of keys and values of attention {home!r} cannot be told from its layers")
    decodes = any("decoder" in part for part in home.split("."))
    kind = branch.kind if branch.kind == "cross" else "decoder" if decodes else "encoder"
    return Attended(home, branch, kind, *widths)


def _widths(anatomy: Anatomy, branch: Branch, home: str) -> tuple[int, int] | None:
    """Widths of keys and values, all heads together."""
    module = anatomy.module(home)
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    heads, key, value = (getattr(module, name, None) for name in ("num_heads", "key_dim", "val_dim"))
    if heads and key and value:  # TinyViT: narrow keys, wide values
        return heads * key, heads * value
    layers = {anatomy.site(path).role: out_channels(anatomy.module(path)) or 0 for path in branch.first}
    for role, parts in (("attn.qkv", 3), ("attn.kv", 2)):
        if role in layers:
            return layers[role] // parts, layers[role] // parts
    keys = layers.get("attn.k", layers.get("attn.qk", 0) // 2)
    values = layers.get("attn.v", 0)
    return (keys, values) if keys and values else None
