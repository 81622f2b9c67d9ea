"""Forms: the small modules and choices that several methods share. Each stands once."""

from .conv_bottleneck import ConvBottleneck
from .copies import copies
from .linear_bottleneck import LinearBottleneck

__all__ = ["ConvBottleneck", "LinearBottleneck", "copies"]
