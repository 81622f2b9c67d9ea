"""One builder per system and form: from a case's config and mode to the system, built by us."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from ..case import Config, GoldenCase
from ..files import CaseError, CaseFiles

Builder = Callable[[Config, str], GoldenCase]

SYSTEMS: Mapping[str, Mapping[str, Builder]] = {
    found.name: importlib.import_module(f"{__name__}.{found.name}").FORMS
    for found in pkgutil.iter_modules(__path__)
    if not found.name.startswith("_")
}
"""The forms of every system: one module per system, named like it; names with an underscore are parts of others."""


def build(files: CaseFiles) -> GoldenCase:
    """Build the system of a case.

    Raises:
        CaseError: There is no builder for its system or form, or a config value is missing or unknown.
    """
    if files.system not in SYSTEMS:
        raise CaseError(f"{files.name}: no builder for system {files.system!r} yet; there are {sorted(SYSTEMS)}")
    forms = SYSTEMS[files.system]
    if files.form not in forms:
        raise CaseError(f"{files.name}: {files.system} has no form {files.form!r}; it has {sorted(forms)}")
    return forms[files.form](_Strict.of(files.config), files.mode)


class _Strict(dict[str, Any]):
    """A config in which a key that a builder needs and the case does not give is an error of the case."""

    def __missing__(self, key: str) -> Any:
        raise CaseError(f"the config lacks {key!r}; it has {sorted(self)}")

    @classmethod
    def of(cls, value: Any) -> Any:
        """The same plain data, strict at every level."""
        if isinstance(value, dict):
            return cls({key: cls.of(inner) for key, inner in value.items()})
        return [cls.of(inner) for inner in value] if isinstance(value, list) else value
