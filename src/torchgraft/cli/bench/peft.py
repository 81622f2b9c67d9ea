"""``torchgraft bench peft``: LoRA of HF peft against ours on the same layers."""

from __future__ import annotations

from ..console import results_only, table, working
from ..options import AsJson
from .options import Batch, ChannelsLast, Check, CheckTimes, Device, DType, Levels, Model, Rounds, Side
from .output import conclude, mib, ratio

EXAMPLES = """\
torchgraft bench peft resnet50
torchgraft bench peft vit_small_patch16_224 --levels plain,exact,recompute
torchgraft bench peft convnext_tiny --image-size 64 --rounds 3 --check --json"""


def run(
    model: Model,
    levels: Levels = None,
    batch: Batch = 8,
    image_size: Side = 224,
    dtype: DType = "fp32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    rounds: Rounds = 5,
    check: Check = False,
    check_times: CheckTimes = False,
    as_json: AsJson = False,
) -> None:
    """Compare LoRA of HF peft with ours on the same layers of MODEL.

    Both get the same A, B and classifier, so their outputs must agree (difference). Bytes in MiB as in bench memory,
    the time of a training step relative to HF peft, the size of the saved file, and how long it takes to switch
    between two adapters that are in memory.
    """
    with results_only(as_json):
        from torchgraft.bench.peft_match import match
        from torchgraft.bench.subjects import Setting, as_list

        setting = Setting(model, batch, image_size, dtype, device, channels_last)
        with working(f"measuring {model}") as say:
            found = match(setting, as_list(levels, ("plain", "exact")), rounds=rounds, say=say)
        right = ("trained", "saved", "saved/peft", "peak", "whole", "time/peft", "file kB", "switch ms", "difference")
        rows = [
            (
                "HF peft" if not r.memory.level else f"torchgraft {r.memory.level}",
                f"{r.memory.trainable:,}",
                mib(r.memory.saved),
                ratio(found.saved_ratio(r)),
                mib(r.memory.peak),
                mib(r.memory.whole),
                ratio(r.ratio),
                f"{r.file / 1e3:.0f}",
                f"{1e3 * r.switch:.2f}",
                f"{r.difference:.1e}",
            )
            for r in found.rows
        ]
        table(("lora", *right), rows, right=right)
    conclude("peft", found.to_dict(), found.goals(), as_json=as_json, check=check, check_times=check_times)
