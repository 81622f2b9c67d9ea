"""What is attached: one file per method. Importing this package registers them all."""

from .conv_adapter import ConvAdapter

__all__ = ["ConvAdapter"]
