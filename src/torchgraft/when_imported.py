"""Doing something as soon as another package has been imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(package: str, then: Callable[[], object]) -> None:
    """Call ``then`` once: now if ``package`` is imported already, else right after its import.

    Args:
        package: Name of a top-level package.
        then: What to do. An exception from it is one of the import.
    """
    if package in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Finder(package, then))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one package where the others would find it, and has ``then`` called when its code has run."""

    def __init__(self, package: str, then: Callable[[], object]) -> None:
        self.package, self.then = package, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The package's own spec, whose loader tells us; None for all other modules."""
        if fullname != self.package:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        loader = spec.loader if spec is not None else None
        if loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            sys.meta_path.remove(self)
            self.then()

        loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
