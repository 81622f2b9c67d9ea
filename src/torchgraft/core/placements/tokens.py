"""Tokens: prompt tokens inserted before a block and stripped after one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...swap import original_class
from ..graft import RESERVED, Args, Kwargs, first_output, first_tensor, replace_first, replace_output
from ..layers import channel_axis, is_conv, is_norm
from .base import Hook, Placement, Support
from .positioned_attention import attend, wrapped


class Tokens(Placement):
    """Insert the tokens that ``form`` returns into a sequence (B, N, d), and take them out again.

    They stand after the ``prefix`` tokens (class, registers), so that readers of the class token and of
    the patch grid find what they expect behind the last prompted block. What the blocks are given beside the
    sequence grows with it: masks hide no prompt, biases over pairs of tokens are zero, rotary embeddings identities.

    Args:
        form: Module whose forward takes nothing and returns (P, d).
        first: Path of the block at whose input the tokens enter.
        last: Path of the block at whose output they leave; the same block for deep prompts.
        prefix: Number of tokens that stay in front.
        through: Paths of the blocks behind ``first``, up to ``last``, which get the longer sequence too.
        biased: The attention modules in these blocks that add a bias per pair of positions, by path.
        dropout: Rate at which values of the prompts are dropped in training, in each image apart.
        overwrite: Take the place of the first P tokens behind the prefix, and stay there.
        strip: Take them out at ``last``.

    Attributes:
        splits: Whether sequences with and without the prompts are of one length between modules, so that rows of
            several adapters can pass them in one batch.
    """

    kind: ClassVar[str] = "tokens"

    def __init__(
        self,
        form: nn.Module,
        first: str,
        last: str,
        *,
        prefix: int = 0,
        through: Sequence[str] = (),
        biased: Mapping[str, nn.Module] | None = None,
        dropout: float = 0.0,
        overwrite: bool = False,
        strip: bool = True,
        slot: str | None = None,
    ) -> None:
        super().__init__(first, slot)
        self.form, self.first, self.last, self.prefix = form, first, last, prefix
        # A sequence that does not grow needs nothing beside it to grow.
        self.through = () if overwrite else tuple(through)
        self.cores = {} if overwrite else {path: _Core(self, module) for path, module in (biased or {}).items()}
        self.dropout = dropout
        self.overwrite, self.strip = overwrite, strip and not overwrite
        self.splits = overwrite or (strip and first == last)
        self.count = 0

    def hooks(self) -> list[Hook]:
        """One action where the tokens enter, one where they leave, and what grows on the way."""
        between = [Hook(path, "before", _Growing(self)) for path in self.through]
        cores = [Hook(path, "around", core) for path, core in self.cores.items()]
        return [Hook(self.first, "before", self), *between, *cores, Hook(self.last, "after", self)]

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Insert."""
        x = first_tensor(args, kwargs)
        prompts = self.form()
        if self.count != prompts.shape[0]:
            self.count = prompts.shape[0]
        rows = F.dropout(prompts.to(x.dtype).expand(x.shape[0], -1, -1), self.dropout, self.training)
        behind = self.prefix + (self.count if self.overwrite else 0)
        joined = torch.cat([x[:, : self.prefix], rows, x[:, behind:]], dim=1)
        if not self.overwrite:
            args, kwargs = self.grown(args, kwargs, x.shape[1])
        return replace_first(args, kwargs, joined)

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """Strip."""
        if not self.strip:
            return out
        y: Tensor = first_output(out)
        kept = torch.cat([y[:, : self.prefix], y[:, self.prefix + self.count :]], dim=1)
        return replace_output(out, kept)

    def grown(self, args: Args, kwargs: Kwargs, length: int) -> tuple[Args, Kwargs]:
        """The arguments with everything that counts ``length`` tokens made to count the prompts too."""
        return (
            tuple(self._longer(a, length) for a in args),
            {k: self._turned(v, length) if k == "rope" else self._longer(v, length, k) for k, v in kwargs.items()},
        )

    def _longer(self, value: Any, length: int, name: str = "") -> Any:
        """A mask or bias (..., heads, N, N) or (B, heads, 1, N) that lets every token see the prompts.

        The prompts see what some token sees (padding stays hidden); a bias is zero for them.
        """
        if not isinstance(value, Tensor) or value.dim() < 3 or value.shape[-1] != length:
            return value
        if value.dim() == 3 and not name.endswith(("bias", "mask")):  # it may be another sequence
            return value
        if value.shape[-2] == length:
            seen = value.any(-2, keepdim=True) if value.dtype == torch.bool else value.amax(-2, keepdim=True)
            rows = (torch.zeros_like(seen) if name.endswith("bias") else seen).expand(
                *seen.shape[:-2], self.count, length
            )
            value = torch.cat([value[..., : self.prefix, :], rows, value[..., self.prefix :, :]], -2)
        return self._with_rows(value, -1, self.prefix, True if value.dtype == torch.bool else 0.0)

    def _turned(self, rope: Any, length: int) -> Any:
        """Rotary embeddings (..., N, sines | cosines) that leave the prompts as they are."""
        if not isinstance(rope, Tensor) or rope.shape[-2] not in (length, length - self.prefix):
            return rope
        at = self.prefix if rope.shape[-2] == length else 0
        sines, cosines = rope.chunk(2, -1)
        return torch.cat([self._with_rows(sines, -2, at, 0.0), self._with_rows(cosines, -2, at, 1.0)], -1)

    def _with_rows(self, value: Tensor, axis: int, at: int, fill: float | bool) -> Tensor:
        size = list(value.shape)
        size[axis] = self.count
        before, behind = value.split([at, value.shape[axis] - at], axis)
        return torch.cat([before, value.new_full(size, fill), behind], axis)

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """Blocks over token sequences; not layers that treat every token alone."""
        name = original_class(module).__name__
        if isinstance(module, nn.MultiheadAttention):
            return Support(False, False, f"{name} would get the prompts as queries only; prompt the block around it")
        if _is_single_layer(module):
            return Support(
                False, False, f"{name} is a single layer, where prompts would change no other token; prompt a block"
            )
        return Support(True, False, "extra tokens are no change of a weight")

    def supports_here(self, module: nn.Module) -> Support:
        """Blocks; where the prompts stay for further modules, also layers over (B, N, d)."""
        passes_on = self.first != self.last and not isinstance(module, nn.MultiheadAttention)
        if passes_on and not is_conv(module) and not (is_norm(module) and channel_axis(module) == 1):
            return Support(True, False, "extra tokens are no change of a weight")
        return type(self).supports(module)


class _Growing:
    """Before a block on the way: what it is given beside the sequence."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        x = first_tensor(args, kwargs)
        grown, more = self.tokens.grown(args, kwargs, x.shape[1] - self.tokens.count)
        return replace_first(grown, more, x)


class _Core:
    """Around an attention module whose own code has no place for tokens without a position."""

    def __init__(self, tokens: Tokens, module: nn.Module) -> None:
        self.tokens, self.module = tokens, module

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        x = first_tensor(args, kwargs)
        others = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a is not x]
        added = others[0] if others else None
        return wrapped(self.module, attend(self.module, x, self.tokens.count, at=self.tokens.prefix, added=added))


def _is_single_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one layer that mixes no tokens: torch's own leaves (but for recurrent ones) and kin."""
    if is_conv(module) or is_norm(module) or isinstance(module, (nn.Linear, nn.Embedding)):
        return True
    leaf = all(name == RESERVED for name, _ in module.named_children())
    own = original_class(module).__module__.startswith("torch.nn.modules.")
    return leaf and own and not isinstance(module, nn.RNNBase)
