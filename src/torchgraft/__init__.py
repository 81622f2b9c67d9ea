"""torchgraft: adapt one frozen, pretrained vision backbone to many tasks by training a few per cent of it."""

from .core import (
    Adapter,
    Anatomy,
    Combination,
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
    method,
    methods,
    plan,
    read_config,
    read_task,
    register,
    save,
)
from .errors import GraftError
from .methods import ConvAdapter
from .version import VERSION

__version__ = VERSION

__all__ = [
    "Adapter",
    "Anatomy",
    "Combination",
    "ConvAdapter",
    "GraftError",
    "Method",
    "Plan",
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
    "method",
    "methods",
    "plan",
    "read_config",
    "read_task",
    "register",
    "save",
]
