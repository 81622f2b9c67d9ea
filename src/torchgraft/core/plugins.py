"""Methods from other packages: entry points of the group ``torchgraft.methods``.

A package that defines methods names its module in its ``pyproject.toml``; importing the module registers them:

    [project.entry-points."torchgraft.methods"]
    my-methods = "my_package.methods"
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings

GROUP = "torchgraft.methods"


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Import every plug-in once; one that cannot be imported is told about and left out.

    Returns:
        The names of the entry points that were imported.
    """
    loaded = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever a foreign package does wrong must not take the others with it
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"the plug-in {entry.name!r} ({entry.value}) is left out: {reason}", stacklevel=2)
        else:
            loaded.append(entry.name)
    return tuple(loaded)
