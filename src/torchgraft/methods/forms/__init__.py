"""Forms: the small modules that several methods share. Each stands once."""

from .conv_bottleneck import ConvBottleneck

__all__ = ["ConvBottleneck"]
