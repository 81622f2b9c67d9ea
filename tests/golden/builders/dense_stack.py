"""Builder of the system ``dense_stack``: the segmentation heads on given maps."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from torchgraft.errors import GraftError
from torchgraft.tasks.heads import SemanticFPN, UPerNet

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase, Tensors
from ..files import CaseError


def semantic_fpn(config: Config, mode: str) -> GoldenCase:
    """Neck and head."""
    _check(config, ("in_channels", "fpn_channels", "channels", "num_classes", "feature_strides"))
    try:
        head = SemanticFPN(
            config["in_channels"],
            config["feature_strides"],
            config["num_classes"],
            fpn_width=config["fpn_channels"],
            width=config["channels"],
            norm=config["norm"],
            dropout=0.0,
        )
    except GraftError as error:
        raise CaseError(str(error)) from error
    return HeadCase(head)


def upernet_head(config: Config, mode: str) -> GoldenCase:
    """The whole head."""
    _check(config, ("in_channels", "channels", "num_classes", "pool_scales"))
    try:
        head = UPerNet(
            config["in_channels"],
            config["num_classes"],
            width=config["channels"],
            pools=config["pool_scales"],
            norm=config["norm"],
            dropout=0.0,
        )
    except GraftError as error:
        raise CaseError(str(error)) from error
    return HeadCase(head)


FORMS = {"semantic_fpn": semantic_fpn, "upernet_head": upernet_head}


class HeadCase(BackboneCase):
    """Maps ``c2`` and on in, logits out; our names are the published ones."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(head, lambda key: key)

    def forward(self, inputs: Tensors) -> Tensors:
        return {"logits": self.model([inputs[f"c{i + 2}"] for i in range(len(inputs))])}


def _check(config: Config, keys: Iterable[str]) -> None:
    if unknown := sorted(config.keys() - {"form", "norm", "align_corners", *keys}):
        raise CaseError(f"dense_stack: the config holds {', '.join(unknown)}, which means nothing to us")
    if config["align_corners"] is not False:
        raise CaseError(f"dense_stack: align_corners={config['align_corners']!r}, expected false")
