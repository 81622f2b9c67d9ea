"""Tokens: prompt tokens inserted before a block and stripped after one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..graft import Args, Kwargs, first_output, first_tensor, replace_first, replace_output
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
        """Blocks over token sequences."""
        return Support(True, False, "extra tokens are no change of a weight")
