"""KeyValue: learned keys and values inside attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import GraftError
from ...swap import original_class
from ..attend import Attend
from ..attention import FusedPath, why_no_core, with_core
from ..graft import Args, Kwargs
from .base import Hook, Placement, Support

Compose = Literal["joint", "apart", "relu"]


class KeyValue(Placement):
    """l learned keys P_k and values P_v beside those of an attention module, for every head.

        joint   softmax(s q [P_k; K]^T + [0, mask]) [P_v; V]                 one softmax (prefix tuning)
        apart   softmax(s q K^T + mask) V + softmax(s q P_k^T) P_v           two softmaxes, added
        relu    softmax(s q K^T + mask) V + relu(s q P_k^T) P_v              a bottleneck per head

    The module runs its own forward; only its step from queries, keys and values to the heads is exchanged
    (:mod:`torchgraft.core.attention`). So norms of queries and keys, rotary positions, relative position biases,
    windows and caches stay what they are: the learned keys get no norm, no rotation and no bias, and every query
    sees them, under causal and padding masks too. All windows of a windowed attention share them.

    Args:
        form: Module whose forward takes nothing and returns (P_k, P_v), of shapes (l, heads * e) with e the width of
            a key (a value) in one head.
        home: Path of the attention module.
        host: The attention module itself.
        compose: How they are joined with the module's own.

    Raises:
        GraftError: When run, if a width is not that of the module's keys and values.
    """

    kind: ClassVar[str] = "key_value"

    def __init__(
        self, form: nn.Module, home: str, host: nn.Module, *, compose: Compose = "joint", slot: str | None = None
    ) -> None:
        super().__init__(home, slot)
        self.form, self.compose = form, compose
        # In a tuple: the module holds this placement, and must not become its child in turn.
        self.host = (host,)
        self.attention = original_class(host)
        self._run = self._runner()

    def hooks(self) -> list[Hook]:
        """In the place of the attention module's forward."""
        return [Hook(self.home, "around", self)]

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """The module's own forward with :meth:`core` inside."""
        module: Any = self.host[0]
        return self._run(FusedPath(module) if getattr(module, "fused_attn", True) is False else module, *args, **kwargs)

    def core(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """The heads' outputs for queries (..., H, N, e), keys and values (..., H, S, e)."""
        keys, values = self.form()
        keys, values = self._rows(keys, k, attend.heads), self._rows(values, v, attend.heads)
        extra = keys.shape[-2]
        if self.compose == "joint":
            return attend(q, torch.cat([keys, k], dim=-2), torch.cat([values, v], dim=-2), extra)
        own = attend(q, k, v)
        if self.compose == "apart":
            return own + attend(q, keys, values, extra)
        return own + ((q * attend.scale) @ keys.transpose(-2, -1)).relu() @ values

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """Every attention module whose inner step can be exchanged."""
        reason = why_no_core(module)
        return Support(reason is None, False, reason or "extra keys and values are no change of a weight")

    def _rows(self, rows: Tensor, like: Tensor, axis: int) -> Tensor:
        """(l, heads * e) -> the shape of ``like`` with l in the place of its length."""
        width, folded = like.shape[-1], like.dim() == 3  # (B heads, S, e) in SAM
        heads = rows.shape[1] // width if folded else like.shape[axis]
        if rows.shape[1] != heads * width or (folded and like.shape[0] % heads):
            raise GraftError(
                f"key_value at {self.home!r}: rows of {rows.shape[1]} are given; expected {heads} heads of {width}"
            )
        rows = rows.to(like.dtype).view(-1, heads, width).transpose(0, 1)
        if folded:
            return rows.repeat(like.shape[0] // heads, 1, 1)
        if axis != -3:  # windows stand between the heads and the tokens
            rows = rows.unsqueeze(1)
        return rows.expand(*like.shape[:-2], -1, -1)

    def _runner(self) -> Callable[..., Any]:
        return with_core(self.attention, self.core)

    def __getstate__(self) -> dict[str, Any]:
        # The function is bound to this very placement: copies make their own.
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._run = self._runner()
