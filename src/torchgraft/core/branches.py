"""The residual branches of transformer-like blocks: attention, cross-attention and MLP.

A branch starts at the residual stream, usually through a norm, and is added to it again, usually through
LayerScale and DropPath:

    pre-norm     x + drop_path(scale(branch(norm(x))))        ViT, Swin, T5, ConvNeXt's MLP
    post-norm    norm(x + dropout(branch(x)))                 BERT, BART, Swin V2

Which modules play which part is told by the roles of a block's layers and by the order in which the dry run saw
them called, so that it holds whatever the parts are named.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import TYPE_CHECKING

from torch import nn

from ..errors import GraftError
from .blocks import class_name
from .layers import is_conv, is_norm
from .placements.base import Point
from .probe import Call

if TYPE_CHECKING:
    from .anatomy import Anatomy, Site

_CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)
"""Names of attention modules that read another sequence (T5, BART, BERT as a decoder)."""
_ON_THE_WAY = re.compile(r"Drop|LayerScale|Identity|StochasticDepth|Scale$|Affine")
"""Classes of what stands between a branch's last layer and the residual sum."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """One residual branch of a block.

    Attributes:
        block: Path of the block.
        kind: ``attn``, ``cross`` (attention over another sequence) or ``mlp``.
        module: Path of the attention or MLP module; None where the block itself holds fc1 and fc2.
        norm: Path of the norm in front of it; None in post-norm blocks.
        stream: The residual stream it starts from; in a block that begins with a convolution (ConvNeXt) the map
            that its norm reads.
        reads: What its first layers read: the output of the norm; in post-norm blocks the stream itself.
        first: Paths of its first layers: qkv, or q, k and v; fc1, both halves of a gated one.
        last: Path of its last layer: attn.proj, fc2.
        returns: Its output before dropout, LayerScale and DropPath.
        adds: What is added to the stream, behind all of these. Where a block turns a map's channels to the end
            for the branch and back behind it (ConvNeXt), the branch's own output, in front of LayerScale.
    """

    block: str
    kind: str
    module: str | None
    norm: str | None
    stream: Point
    reads: Point
    first: tuple[str, ...]
    last: str
    returns: Point
    adds: Point

    @property
    def pre_norm(self) -> bool:
        """Whether a norm stands between the stream and the branch."""
        return self.norm is not None


def branches_of(anatomy: Anatomy, block: str) -> list[Branch]:
    """The branches of one block, in the order in which they run; empty where the dry run saw none."""
    if anatomy.trace is None:
        return []
    finder = _Finder(anatomy, block, anatomy.trace.calls)
    attentions = anatomy.inside(block, "attn")
    found = [finder.attention(site) for site in attentions]
    found += [finder.mlp(fc2, attentions) for fc2 in anatomy.inside(block, "mlp.fc2")]
    known = [b for b in found if b is not None]
    return sorted(known, key=lambda b: finder.order(b.last))


class _Finder:
    """The search in one block."""

    def __init__(self, anatomy: Anatomy, block: str, calls: dict[str, Call]) -> None:
        self.anatomy, self.block, self.calls = anatomy, block, calls
        inside = [p for p in calls if p.startswith(block + ".")]
        self.called = sorted(inside, key=lambda p: calls[p].order)

    def order(self, path: str) -> int:
        """When the module was called; a layer that its parent reads counts as called with the parent."""
        while path and path not in self.calls:
            path = path.rpartition(".")[0]
        return self.calls[path].order if path else -1

    def attention(self, site: Site) -> Branch | None:
        """The branch of an attention module."""
        own = [s for s in self.anatomy.inside(self.block) if s.path.startswith(site.path + ".")]
        first = tuple(s.path for s in own if s.role in ("attn.qkv", "attn.q", "attn.k", "attn.v", "attn.kv", "attn.qk"))
        last = next((s.path for s in reversed(own) if s.role == "attn.proj"), None)
        if site.path not in self.calls or (last is None and not self._whole(site.path)):
            return None
        kind = "cross" if _CROSS.search(site.path[len(self.block) :]) else "attn"
        return self._branch(kind, site.path, first, last or site.path)

    def mlp(self, fc2: Site, attentions: list[Site]) -> Branch | None:
        """The branch that ends in ``fc2``."""
        if fc2.path not in self.calls:
            return None
        holder = next(
            (s.path for s in self.anatomy.inside(self.block, "mlp") if fc2.path.startswith(s.path + ".")), None
        )
        inside = (holder or self.block) + "."
        first = tuple(
            s.path
            for s in self.anatomy.inside(self.block, "mlp.fc1")
            if s.path.startswith(inside)
            and s.path in self.calls
            and not any(s.path.startswith(a.path + ".") for a in attentions)
        )
        return self._branch("mlp", holder, first, fc2.path) if first else None

    def _branch(self, kind: str, module: str | None, first: tuple[str, ...], last: str) -> Branch:
        entrance = module if module in self.calls else first[0]
        norm = self._norm_before(entrance, first)
        reads = Point(entrance, "input") if norm is None else Point(norm, "output")
        stream = reads if norm is None else Point(norm, "input")
        if norm is None and kind == "attn" and self.calls[entrance].input != self.calls[self.block].input:
            stream = Point(self.block, "input")  # the attention reads windows of it
        returns = Point(last if last in self.calls else module or last, "output")
        return Branch(self.block, kind, module, norm, stream, reads, first, last, returns, self._sum(returns, reads))

    def _norm_before(self, entrance: str, first: tuple[str, ...]) -> str | None:
        """The norm that is called last before the branch, unless the block computes before it norms."""
        norms = [p for p in self.called if self._is_stream_norm(p)]
        layers = [p for p in self.called if self._computes(p)]
        if not norms or not layers:
            return None
        post_norm = self.order(norms[0]) > self.order(layers[0])
        if post_norm and not is_conv(self.anatomy.module(layers[0])):  # ConvNeXt begins with a convolution
            return None
        start = min((self.order(p) for p in first), default=self.order(entrance))
        width = (self.calls[entrance].input or ())[-1:]  # windows change every other axis
        ahead = [p for p in norms if self.order(p) < start and (self.calls[p].output or ())[-1:] == width]
        return ahead[-1] if ahead else None

    def _is_stream_norm(self, path: str) -> bool:
        """A norm of the block, not one inside its attention or MLP."""
        if not is_norm(self.anatomy.module(path)) or self.calls[path].count != 1:
            return False
        holders = [s.path for s in self.anatomy.inside(self.block, "attn", "mlp")]
        inner = next((h for h in holders if path.startswith(h + ".")), None)
        # BERT and T5 keep the norm of the stream beside the attention's layers, not between them.
        layers = [p for p in self.called if inner and p.startswith(inner + ".") and self._computes(p)]
        return not layers or not self.order(layers[0]) < self.order(path) < self.order(layers[-1])

    def _computes(self, path: str) -> bool:
        site = self.anatomy.site(path)
        return site.role.startswith(("attn.", "mlp.")) or site.role in ("spatial_conv", "conv", "linear")

    def _whole(self, path: str) -> bool:
        return not any(True for _ in self.anatomy.module(path).children())

    def _sum(self, returns: Point, reads: Point) -> Point:
        """The last module behind the branch's output that still holds it alone, before it meets the stream."""
        start, found = self.order(returns.path), returns
        around = [Point(self.block, side) for side in ("input", "output")]
        shapes = {self.anatomy.shape(point) for point in (reads, *around)}  # branches may stride or run on windows
        within = self._turned_for_the_branch(returns, reads)
        behind = [p for p in self.called if self.order(p) > start]
        for i, path in enumerate(behind):
            holds = returns.path.startswith(path + ".")
            after = self._in_sequence(returns.path, path) or self._drops_after(behind[i + 1 :])
            normed = is_norm(self.anatomy.module(path)) and after
            if (holds and self._holds_sum(path)) or not (holds or normed or self._is_on_the_way(path)):
                break
            if within and not holds:
                break
            if self.calls[path].count == 1 and self.calls[path].output in shapes:
                found = Point(path, "output")
        return found

    def _in_sequence(self, layer: str, path: str) -> bool:
        """Whether both stand in one ``nn.Sequential``, so that no sum comes between them."""
        holder = layer.rpartition(".")[0]
        same = path.rpartition(".")[0] == holder
        return same and isinstance(self.anatomy.module(holder), nn.Sequential)

    def _is_on_the_way(self, path: str) -> bool:
        shortcut = path.rpartition(".")[2] in ("shortcut", "downsample", "skip")
        return not shortcut and bool(_ON_THE_WAY.search(class_name(self.anatomy.module(path))))

    def _turned_for_the_branch(self, returns: Point, reads: Point) -> bool:
        """Whether a map's channels are turned to the end in front of this branch and turned back behind it."""
        holder = returns.path.rpartition(".")[0]
        while holder != self.block and (holder not in self.calls or not self._holds_sum(holder)):
            holder = holder.rpartition(".")[0]
        given, own = self.calls[holder].input, self.anatomy.shape(reads)
        if given is None or len(given) != len(own) or len(own) < 4:
            return False
        try:
            given_first = self.anatomy.layout(Point(holder, "input")).name == "NC..."
            return given_first and self.anatomy.layout(reads).name != "NC..."
        except GraftError:  # tokens in the order of windows, which are no map (Nest)
            return False

    def _holds_sum(self, path: str) -> bool:
        """Whether a module around the branch also holds the norm of the stream, and so the residual sum."""
        return any(p.startswith(path + ".") and self._is_stream_norm(p) for p in self.called)

    def _drops_after(self, behind: list[str]) -> bool:
        """Whether a DropPath follows at once: a norm in front of it belongs to the branch (Swin V2)."""
        if not behind:  # torchvision has one for both branches of a block, seen behind the first
            return any(
                self._drops_paths(path) and self.calls[path].count > 1 and is_norm(self.anatomy.module(before))
                for before, path in itertools.pairwise(self.called)
            )
        return self._drops_paths(behind[0])

    def _drops_paths(self, path: str) -> bool:
        name = class_name(self.anatomy.module(path))
        return name in ("DropPath", "StochasticDepth") or (name == "Identity" and "drop" in path.rpartition(".")[2])
