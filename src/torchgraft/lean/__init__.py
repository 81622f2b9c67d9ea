"""Lean: frozen layers that remember no more than the mathematics asks for."""

from .install import LEVELS, level_of

__all__ = ["LEVELS", "level_of"]
