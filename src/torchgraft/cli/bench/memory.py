"""``torchgraft bench memory``: bytes of training, by method and level."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import note, results_only, table, working
from ..options import AsJson
from .options import Batch, ChannelsLast, Check, Device, DType, Levels, Methods, Model, Side
from .output import conclude, mib, ratio

EXAMPLES = """\
torchgraft bench memory resnet50
torchgraft bench memory convnext_tiny --levels plain,exact,recompute,checkpoint,compact --fake --check
torchgraft bench memory convnext_tiny --methods all --levels exact --fake
torchgraft bench memory vit_small_patch16_224 --methods "lora,vpt-deep[num_tokens=10]" --json"""


def run(
    model: Model,
    methods: Methods = None,
    levels: Levels = None,
    batch: Batch = 8,
    image_size: Side = 224,
    dtype: DType = "fp32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    fake: Annotated[
        bool, typer.Option("--fake", help="Count on tensors without data, in less time and memory; no peak.")
    ] = False,
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Compare the memory of training MODEL by method and level.

    What autograd keeps for the backward (saved), the most that forward and backward hold at once (peak), weights,
    gradients and AdamW's moments, in MiB; and what is saved relative to full fine-tuning and to LoRA of HF peft on
    the same layers. Level plain is a method as it is usually coded.
    """
    with results_only(as_json):
        from torchgraft.bench.memory import compare
        from torchgraft.bench.subjects import Setting, as_list

        setting = Setting(model, batch, image_size, dtype, device, channels_last)
        named = None if methods is None else as_list(methods, ())
        with working(f"measuring {model}") as say:
            found = compare(setting, named, as_list(levels, ("plain", "exact")), fake=fake, say=say)
        right = ("trained", "saved", "peak", "weights", "gradients", "optimiser", "whole", "saved/full", "saved/peft")
        rows = [
            (
                r.method,
                r.level,
                f"{r.trainable:,}",
                *map(mib, (r.saved, r.peak, r.weights, r.gradients, r.optimiser, r.whole)),
                ratio(found.to("full", r)),
                ratio(found.to("peft-lora", r)),
            )
            for r in found.rows
        ]
        table(("method", "level", *right), rows, right=right)
        for reason in found.refused.values():
            note(reason)
    conclude("memory", found.to_dict(), found.goals(), as_json=as_json, check=check)
