"""Core: how anything attaches. Methods are known here only through their registry."""

from .adapter import Adapter, activate, active, adapters, attach, detach
from .anatomy import Anatomy, Site, anatomy
from .checkpoint import load, read_config, read_task, read_tensors, save
from .fingerprint import fingerprint
from .method import Combination, Method, method, methods, register
from .plan import Plan, plan, saved_bytes

__all__ = [
    "Adapter",
    "Anatomy",
    "Combination",
    "Method",
    "Plan",
    "Site",
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
    "read_tensors",
    "register",
    "save",
    "saved_bytes",
]
