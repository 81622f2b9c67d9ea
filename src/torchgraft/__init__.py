"""torchgraft: adapt one frozen, pretrained vision backbone to many tasks by training a few per cent of it.

The public names below are loaded on first use, so that `torchgraft --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import GraftError
from .version import VERSION

if TYPE_CHECKING:
    from .core import (
        Adapter,
        Anatomy,
        Combination,
        MergeReport,
        Method,
        Plan,
        Site,
        activate,
        active,
        adapters,
        anatomy,
        attach,
        detach,
        fingerprint,
        load,
        merge,
        method,
        methods,
        plan,
        read_config,
        read_task,
        register,
        route,
        save,
        unmerge,
    )
    from .methods import BitFit, ConvAdapter, Full, Linear, NormTuning, PadPrompt, Partial, RepNet

__version__ = VERSION

__all__ = [
    "Adapter",
    "Anatomy",
    "BitFit",
    "Combination",
    "ConvAdapter",
    "Full",
    "GraftError",
    "Linear",
    "MergeReport",
    "Method",
    "NormTuning",
    "PadPrompt",
    "Partial",
    "Plan",
    "RepNet",
    "Site",
    "__version__",
    "activate",
    "active",
    "adapters",
    "anatomy",
    "attach",
    "detach",
    "fingerprint",
    "load",
    "merge",
    "method",
    "methods",
    "plan",
    "read_config",
    "read_task",
    "register",
    "route",
    "save",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """Import the home of a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = importlib.import_module(".methods", __name__)
    if name == "methods":
        return package
    home = package if name in package.__all__ else importlib.import_module(".core", __name__)
    globals()[name] = getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
