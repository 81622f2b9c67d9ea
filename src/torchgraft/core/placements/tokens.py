"""Tokens: prompt tokens inserted before a block and stripped after one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...swap import original_class
from ..graft import RESERVED, Args, Kwargs, first_output, first_tensor, replace_first, replace_output
from ..layers import channel_axis, is_conv, is_norm
from .base import Hook, Placement, Support


class Tokens(Placement):
    """Insert the tokens that ``form`` returns into a sequence (B, N, d), and take them out again.

    They stand after the ``prefix`` tokens (class, registers), so that readers of the class token and of
    the patch grid find what they expect behind the last prompted block.

    Args:
        form: Module whose forward takes nothing and returns (P, d).
        first: Path of the block at whose input the tokens enter.
        last: Path of the block at whose output they leave; the same block for deep prompts.
        prefix: Number of tokens that stay in front.
    """

    kind: ClassVar[str] = "tokens"

    def __init__(self, form: nn.Module, first: str, last: str, *, prefix: int = 0, slot: str | None = None) -> None:
        super().__init__(first, slot)
        self.form, self.first, self.last, self.prefix = form, first, last, prefix
        self.count = 0

    def hooks(self) -> list[Hook]:
        """One action where the tokens enter, one where they leave."""
        return [Hook(self.first, "before", self), Hook(self.last, "after", self)]

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Insert."""
        x = first_tensor(args, kwargs)
        prompts = self.form()
        self.count = prompts.shape[0]
        rows = prompts.to(x.dtype).unsqueeze(0).expand(x.shape[0], -1, -1)
        joined = torch.cat([x[:, : self.prefix], rows, x[:, self.prefix :]], dim=1)
        return replace_first(args, kwargs, joined)

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """Strip."""
        y: Tensor = first_output(out)
        kept = torch.cat([y[:, : self.prefix], y[:, self.prefix + self.count :]], dim=1)
        return replace_output(out, kept)

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


def _is_single_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one layer that mixes no tokens: torch's own leaves (but for recurrent ones) and kin."""
    if is_conv(module) or is_norm(module) or isinstance(module, (nn.Linear, nn.Embedding)):
        return True
    leaf = all(name == RESERVED for name, _ in module.named_children())
    own = original_class(module).__module__.startswith("torch.nn.modules.")
    return leaf and own and not isinstance(module, nn.RNNBase)
