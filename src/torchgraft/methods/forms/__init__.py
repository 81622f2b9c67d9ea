"""Forms: the small modules and choices that several methods share. Each stands once."""

from .conv_bottleneck import ConvBottleneck
from .copies import copies

__all__ = ["ConvBottleneck", "copies"]
