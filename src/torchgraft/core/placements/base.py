"""The base of all placements: one form at one site, with one way of acting there."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ...swap import original_class

Side = Literal["input", "output"]


@dataclasses.dataclass(frozen=True)
class Point:
    """The input or the output of the module at ``path``."""

    path: str
    side: Side

    def __str__(self) -> str:
        return f"{self.side} of {self.path or 'the model'}"


@dataclasses.dataclass(frozen=True)
class Hook:
    """Where one action of a placement goes: the module, the list (``before``, ``after``, ...), the object."""

    path: str
    when: str
    action: Any


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether a placement can act on a layer, whether it can be merged into it, and why not."""

    forward: bool
    merge: bool
    reason: str = ""


class Placement(nn.Module):
    """One form at one site. Subclasses say how it acts; methods only create them.

    A placement's parameters belong to the adapter. It is registered as a child of the module it acts at
    (its *home*), so that ``model.parameters()``, DDP and ``deepcopy`` see it.

    Attributes:
        slot: Name of this placement at its home, unique within an adapter; part of the saved key.
        home: Path of the module it belongs to.
        kind: Name of the placement in tables and docs.
    """

    kind: ClassVar[str] = ""
    functional: ClassVar[bool] = False
    """True when it acts through reading a weight, so that the module itself need not be called."""
    splits: bool = True
    """False when it changes the size of rows between modules, so that only whole models can be split by rows."""

    def __init__(self, home: str, slot: str | None = None) -> None:
        super().__init__()
        self.home = home
        self.slot = slot or self.kind

    def hooks(self) -> list[Hook]:
        """The actions to install, by module path."""
        raise TypeError(f"{type(self).__name__} defines no hooks")

    def views(self) -> tuple[str, ...]:
        """Parameters or buffers of the home module that are read through this placement."""
        return ()

    def owned(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by the name under which they are saved."""
        names = {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())}
        keep = set(self.state_dict(keep_vars=True))
        return {n.removeprefix("form."): t for n, t in names.items() if n in keep}

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """What a placement of this kind can do at ``module``, as far as its layer kind tells."""
        return Support(True, False, f"{cls.kind} has no form that folds into {original_class(module).__name__}")

    def supports_here(self, module: nn.Module) -> Support:
        """What this one placement, with its options, can do at its home ``module``."""
        return type(self).supports(module)
