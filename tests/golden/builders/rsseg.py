"""Builder of the system ``rsseg``: the head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchgraft.errors import GraftError
from torchgraft.tasks.dense.rsseg import RSSegHead, rsseg_loss
from torchgraft.tasks.dense.separation import local_discrepancy

from ..adapted import watching
from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase, Tensors
from ..files import CaseError

_OPTIONS = {
    "dim": "dim",
    "num_classes": "num_classes",
    "sasm_dim": "key_dim",
    "sasm_kernel": "kernel",
    "dca_layers": "layers",
    "heads": "heads",
}
"""Key of a config -> our option."""


def head(config: Config, mode: str) -> GoldenCase:
    """Maps of a ViT in; what every part returns, and the losses, out."""
    if unknown := sorted(config.keys() - {"form", "vit_dim", "taps", *_OPTIONS}):
        raise CaseError(f"rsseg: the config holds {', '.join(unknown)}, which means nothing to us")
    widths = [config["vit_dim"]] * (config["taps"] + 1)
    try:
        return HeadCase(RSSegHead(widths, **{ours: config[key] for key, ours in _OPTIONS.items()}))
    except GraftError as error:
        raise CaseError(str(error)) from error


FORMS = {"head": head}


class HeadCase(BackboneCase):
    """The loss is that of the cross-entropies, each auxiliary one times 0.4. The head is no adapter."""

    def __init__(self, module: RSSegHead) -> None:
        super().__init__(module, lambda key: key)

    def forward(self, inputs: Tensors) -> Tensors:
        module: RSSegHead = self.model  # type: ignore[assignment]
        parts: dict[str, Any] = {}
        with watching(module, {"path": "path", "sasm": "sasm"}, parts):
            found = module([inputs[f"g{index}"] for index in range(len(module.in_channels))])
        losses = rsseg_loss(found, inputs["gt"])
        return {
            "highpass": local_discrepancy(inputs["g0"]),
            "local": parts["path"].local,
            "fused": found.fused,
            "local_mean": parts["sasm"].local_mean,
            "gate": parts["sasm"].gate,
            "separated": found.separated,
            "mask": found.mask,
            "logits": found.logits,
            **{f"att{layer}": each for layer, each in enumerate(found.attention)},
            "region_logits": found.region_logits,
            "loss_mask": losses.mask,
            "loss_att": losses.attention,
            "loss_region": losses.region,
        }

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["loss_mask"] + 0.4 * outputs["loss_att"] + 0.4 * outputs["loss_region"]
