"""Operators that PyTorch does not have, with a kernel for each kind of device.

Importing this compiles nothing; a kernel is made when it is first called.
"""

from .dcnv3 import dcnv3
from .dcnv3.backends import backend_in_use, describe, set_backend

__all__ = ["backend_in_use", "dcnv3", "describe", "set_backend"]
