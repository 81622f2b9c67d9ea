"""Backbones: building one by name with its weights, and the architectures that timm does not have."""

from .assets import AssetInfo, list_assets
from .features import FeatureProvider, create_features
from .pretrained import create_backbone, list_backbones

__all__ = ["AssetInfo", "FeatureProvider", "create_backbone", "create_features", "list_assets", "list_backbones"]
