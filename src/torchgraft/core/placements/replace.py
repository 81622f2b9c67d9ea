"""Replace: the adapter's own module in place of one of the backbone's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from ..graft import Args, Kwargs
from .base import Hook, Placement, Support


class Replace(Placement):
    """While the adapter is active, ``form`` runs instead of the module at ``home``; a task's head.

    Args:
        home: Path of the module that is replaced; it stays in the model, untouched.
        form: What runs instead, with the same arguments.
    """

    kind: ClassVar[str] = "replace"

    def __init__(self, home: str, form: nn.Module, *, slot: str | None = None) -> None:
        super().__init__(home, slot)
        self.form = form

    def hooks(self) -> list[Hook]:
        """One action around the module."""
        return [Hook(self.home, "around", self)]

    def around(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Run the adapter's module."""
        return self.form(*args, **kwargs)

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """Every module that is called."""
        return Support(True, False, "the backbone keeps its own module for other adapters")
