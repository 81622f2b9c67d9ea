"""Builder of the system ``hatnet``: the whole network."""

from __future__ import annotations

from torchgraft.backbones.hatnet import HatNet, official_name
from torchgraft.errors import GraftError

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase
from ..files import CaseError

_OPTIONS = (
    "in_chans",
    "num_classes",
    "dims",
    "head_dim",
    "expansions",
    "grid_sizes",
    "ds_ratios",
    "depths",
    "kernel_sizes",
    "stem_width",
    "drop_rate",
)
"""Keys of a config besides ``form``: our options have the same names."""


def classifier(config: Config, mode: str) -> GoldenCase:
    """Image in; the stem, the stages, the pooled features and the logits out."""
    if unknown := sorted(config.keys() - {"form", *_OPTIONS}):
        raise CaseError(f"hatnet: the config holds {', '.join(unknown)}, which means nothing to us")
    try:
        model = HatNet(**{name: config[name] for name in _OPTIONS})
    except GraftError as error:
        raise CaseError(str(error)) from error
    stages = {f"stage{i}": f"stages.{i}" for i in range(len(config["dims"]))}
    outputs = {"stem": "stem", **stages, "pre_logits": "head.drop"}
    return BackboneCase(model, official_name, outputs, dead=lambda key: official_name(key) is None)


FORMS = {"classifier": classifier}
