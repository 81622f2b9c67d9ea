"""Backbones: building one by name with its weights, and the architectures that timm does not have."""

from .assets import AssetInfo, list_assets
from .pretrained import create_backbone, list_backbones

__all__ = ["AssetInfo", "create_backbone", "list_assets", "list_backbones"]
