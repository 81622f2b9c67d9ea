"""Systems that keep the backbone's names and put their own modules between them: one set of rules renames both.

The official Conv-Adapter code calls an adapter ``<block>.tuning_module`` and the classifier ``head.linear``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .base import Place, System, UnknownKeyError

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def renamed(key: str, rules: Sequence[Rule]) -> str:
    """The key under our names; the first rule that matches applies."""
    for pattern, replacement in rules:
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key


class Renaming(System):
    """A system whose keys become ours by rules, with adapters under ``MODULE.tuning_module``.

    Args:
        model: Our backbone.
        rules: Pattern and replacement, as for ``re.sub``.
        extra_norm: ``norm.*`` is a BatchNorm of the adapter, not one of the backbone.
        dead: Pattern of keys that the official module owns and never uses.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rules: Sequence[Rule] = (),
        extra_norm: bool = False,
        dead: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.rules, self.extra_norm, self.dead = rules, extra_norm, dead

    def is_dead(self, key: str) -> bool:
        """Whether ``dead`` matches."""
        return self.dead is not None and re.search(self.dead, key) is not None

    def place(self, key: str) -> Place | None:
        """The tuning module that the renamed key names, the head, or the backbone."""
        if key.startswith("head.linear."):
            return Place("head", "", key.removeprefix("head.linear."))
        if self.extra_norm and key.startswith("norm."):
            return Place("adapter", "", key.removeprefix("norm."), slot="norm")
        before, found, after = renamed(key, self.rules).partition("tuning_module.")
        if found:
            return Place("adapter", before.removesuffix("."), "scale" if after == "se" else after)
        path, _, leaf = before.rpartition(".")
        if not path and leaf == key and key not in dict(self.model.named_parameters()):
            raise UnknownKeyError(key)
        return Place("backbone", path, leaf)
