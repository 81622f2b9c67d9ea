"""KeyValue: extra keys and values inside attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from ...errors import GraftError
from ...swap import original_class
from ..graft import Args, Kwargs, first_output, replace_output
from .base import Hook, Placement, Support


class KeyValue(Placement):
    """``softmax(q [P_k; K]^T) [P_v; V]``: every query also attends to l learned keys and values.

    Two kinds of attention are served. Modules with separate key and value layers gain the extra rows at
    those layers' outputs and run their own core. timm's ``Attention`` (that of its vision transformers), whose
    ``qkv`` is one layer, runs the core that is written here. Other attentions with a fused ``qkv`` add position
    biases, rotate or shuffle, which that core would leave out; they are refused.

    Args:
        form: Module whose forward takes nothing and returns (keys, values), each (l, d) with d the width
            of the attention (all heads).
        home: Path of the attention module.
        key: Path of the separate key layer, or None for a fused one.
        value: Path of the separate value layer, or None for a fused one.

    Raises:
        GraftError: Only one of ``key`` and ``value`` is given.
    """

    kind: ClassVar[str] = "key_value"

    def __init__(
        self,
        form: nn.Module,
        home: str,
        *,
        key: str | None = None,
        value: str | None = None,
        slot: str | None = None,
    ) -> None:
        super().__init__(home, slot)
        if (key is None) != (value is None):
            raise GraftError(f"key_value at {home!r}: key={key!r}, value={value!r}; expected both layers or neither")
        self.form, self.key, self.value = form, key, value

    def hooks(self) -> list[Hook]:
        """After the key and value layers, or around a fused attention."""
        if self.key is not None and self.value is not None:
            return [Hook(self.key, "after", _Rows(self, 0)), Hook(self.value, "after", _Rows(self, 1))]
        return [Hook(self.home, "around", self)]

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Tensor:
        """The attention core over the longer key and value sequences."""
        module: Any = forward.__self__  # type: ignore[attr-defined]
        given = dict(zip(("x", "attn_mask", "is_causal"), args, strict=False)) | kwargs
        x, mask = given["x"], given.get("attn_mask")
        b, n, _ = x.shape
        if given.get("is_causal", False):
            mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        qkv = module.qkv(x).reshape(b, n, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = _optional(module, "q_norm")(q), _optional(module, "k_norm")(k)
        extra_k, extra_v = (
            t.to(own.dtype).view(-1, module.num_heads, q.shape[-1]).transpose(0, 1).expand(b, -1, -1, -1)
            for t, own in zip(self.form(), (k, v), strict=True)
        )
        k, v = torch.cat([extra_k, k], dim=2), torch.cat([extra_v, v], dim=2)
        if isinstance(mask, Tensor):
            mask = mask.expand(*mask.shape[:-1], n)
            mask = F.pad(mask, (extra_k.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
        drop = _optional(module, "attn_drop")
        rate = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate, scale=module.scale)
        y = _optional(module, "norm")(y.transpose(1, 2).reshape(b, n, -1))
        if getattr(module, "gate", None) is not None:
            y = y * module.gate(x).sigmoid()
        return _optional(module, "proj_drop")(module.proj(y))

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """The plain ``Attention`` of timm; other fused ones would lose what they add to it."""
        found = original_class(module)
        if found is Attention:
            return Support(True, False, "extra keys and values are no change of a weight")
        if getattr(module, "qkv", None) is not None:
            reason = f"{found.__name__} is not timm's plain Attention and may add biases, positions or windows"
            return Support(False, False, f"{reason}, which would be left out")
        return Support(False, False, f"{found.__name__} has no fused qkv; name its key and value layers")

    def supports_here(self, module: nn.Module) -> Support:
        """As :meth:`supports`; with named key and value layers every attention that is not causal."""
        if self.key is None:
            return type(self).supports(module)
        if getattr(module, "is_causal", False) is True:
            return Support(False, False, f"{original_class(module).__name__} is causal and would shift its mask")
        return Support(True, False, "extra keys and values are no change of a weight")


class _Rows:
    """Puts the learned keys (or values) in front of what the key (or value) layer returned."""

    def __init__(self, placement: KeyValue, which: int) -> None:
        self.placement, self.which = placement, which

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        y = first_output(out)
        rows = self.placement.form()[self.which].to(y.dtype).expand(y.shape[0], -1, -1)
        return replace_output(out, torch.cat([rows, y], dim=1))


def _optional(module: nn.Module, name: str) -> nn.Module:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else nn.Identity()
