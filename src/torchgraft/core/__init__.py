"""Core: how anything attaches. Methods are known here only through their registry."""

from .adapter import Adapter, activate, active, adapters, attach, detach
from .anatomy import Anatomy, Site, anatomy
from .checkpoint import load, read_config, read_task, read_tensors, save
from .fingerprint import fingerprint
from .kept import saved_bytes
from .memory_format import prefers_channels_last
from .merge import MergeReport, merge, unmerge
from .method import Combination, Method, method, methods, register
from .plan import Plan, plan
from .precision import cast_frozen
from .routing import route

__all__ = [
    "Adapter",
    "Anatomy",
    "Combination",
    "MergeReport",
    "Method",
    "Plan",
    "Site",
    "activate",
    "active",
    "adapters",
    "anatomy",
    "attach",
    "cast_frozen",
    "detach",
    "fingerprint",
    "load",
    "merge",
    "method",
    "methods",
    "plan",
    "prefers_channels_last",
    "read_config",
    "read_task",
    "read_tensors",
    "register",
    "route",
    "save",
    "saved_bytes",
    "unmerge",
]
