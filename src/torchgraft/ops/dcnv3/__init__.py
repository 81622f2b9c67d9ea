"""DCNv3, the deformable convolution of InternImage."""

from .op import dcnv3

__all__ = ["dcnv3"]
