"""Twins of a model: what timm's feature extractors do to module names.

``create_model(..., features_only=True)`` returns the same layers under other names. ``FeatureListNet`` and kin
rebuild the model from its children and flatten one level of ``nn.Sequential``: ``stages.1`` becomes
``stages_1``, ``features.denseblock1`` becomes ``features_denseblock1``. Others wrap the model in one child.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import nn


def rebuilt(model: nn.Module) -> bool:
    """Whether ``model`` is a feature extractor made of another model's children."""
    return isinstance(model, (FeatureDictNet, FeatureHookNet))


def original_names(model: nn.Module) -> dict[str, str]:
    """Children that a feature extractor has flattened: their name here -> their path in the classifier.

    A flattened name does not say where the dot was. The taps and the first convolution, which the extractor
    lists by their old names, tell which prefixes were containers; a trailing number tells the rest,
    unless a child of the bare name is there too.
    """
    if not rebuilt(model):
        return {}
    known = {name.partition(".")[0] for name in _old_names(model) if "." in name}
    found = {}
    for name in model._modules:
        holder = next((p for p in sorted(known, key=len, reverse=True) if name.startswith(p + "_")), None)
        head, _, tail = name.rpartition("_")
        if holder is not None:
            found[name] = f"{holder}.{name[len(holder) + 1 :]}"
        elif head and tail.isdigit() and head not in model._modules:
            found[name] = f"{head}.{tail}"
    return found


def wrapped_in(model: nn.Module) -> str:
    """Name of the child that holds the whole original model, empty when nothing is wrapped."""
    if isinstance(model, FeatureGetterNet):
        return "model"
    if isinstance(model, FeatureHookNet) and list(model) == ["body"]:
        return "body"
    return ""


def _old_names(model: nn.Module) -> Iterator[str]:
    info = getattr(model, "feature_info", None)
    for tap in getattr(info, "info", ()):
        yield str(tap["module"])
    config = getattr(model, "pretrained_cfg", None)
    first = config.get("first_conv") if isinstance(config, dict) else None
    yield from (first,) if isinstance(first, str) else (first or ())
