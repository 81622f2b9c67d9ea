"""LoRA by HF peft, the peer that the benchmarks measure beside ours; it is part of the ``dev`` extra."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..errors import GraftError
from ..methods import LoRA


def peft_lora(model: nn.Module, layers: Sequence[str], config: LoRA) -> nn.Module:
    """The backbone under LoRA of HF peft, in eval mode, its classifier trained too.

    Args:
        model: The backbone; changed in place.
        layers: Paths of the layers.
        config: Rank and alpha.

    Raises:
        GraftError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise GraftError(
            "peft-lora: HF peft is not installed; pip install 'torchgraft[dev]', or leave it out"
        ) from None
    head = next(path for path, module in model.named_modules() if module is model.get_classifier())  # type: ignore[operator]
    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules="|".join(map(re.escape, layers)),
        modules_to_save=[head],
        init_lora_weights=False,
    )
    return get_peft_model(model, options, autocast_adapter_dtype=False).eval()  # type: ignore[arg-type]


def give_to_peft(adapter: Adapter, model: nn.Module) -> None:
    """Copy A, B and the head of a LoRA of ours into a model of HF peft with LoRA on the same layers."""
    base: Any = model.base_model.model  # type: ignore[union-attr]
    with torch.no_grad():
        for _, placement in adapter.placements:
            layer, form = base.get_submodule(placement.home), placement.form
            for other, own in _pairs(layer, form, is_head=form is adapter.head):
                other.copy_(own.view_as(other))


def _pairs(layer: Any, form: Any, *, is_head: bool) -> list[tuple[Tensor, Tensor]]:
    """Tensors of HF peft and the one of ours that each gets."""
    if is_head:
        return list(zip(layer.modules_to_save["default"].parameters(), form.parameters(), strict=True))
    return [(layer.lora_A["default"].weight, form.down), (layer.lora_B["default"].weight, form.up)]
