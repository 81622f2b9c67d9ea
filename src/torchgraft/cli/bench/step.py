"""``torchgraft bench step``: time and operations of a training step."""

from __future__ import annotations

from ..console import results_only, table, working
from ..options import AsJson
from .options import Batch, ChannelsLast, Check, CheckTimes, Device, DType, Levels, Methods, Model, Rounds, Side
from .output import conclude, ratio

EXAMPLES = """\
torchgraft bench step resnet50
torchgraft bench step resnet50 --channels-last --rounds 9
torchgraft bench step efficientnet_lite0 --methods conv-adapter,peft-lora --check-times --json"""


def run(
    model: Model,
    methods: Methods = None,
    levels: Levels = None,
    batch: Batch = 8,
    image_size: Side = 128,
    dtype: DType = "fp32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    rounds: Rounds = 7,
    check: Check = False,
    check_times: CheckTimes = False,
    as_json: AsJson = False,
) -> None:
    """Compare the time of one training step of MODEL by method and level.

    Forward, backward and AdamW. All variants take turns in every round, and the ratios are medians over the rounds
    (process CPU time; on CUDA the wall clock). Operations are exact. Efficiency is the ratio of operations over the
    ratio of times: 1 when time falls as operations do.
    """
    with results_only(as_json):
        from torchgraft.bench.step_time import race
        from torchgraft.bench.subjects import Setting, as_list

        setting = Setting(model, batch, image_size, dtype, device, channels_last)
        named = None if methods is None else as_list(methods, ())
        with working(f"timing {model}") as say:
            found = race(setting, named, as_list(levels, ("plain", "exact")), rounds=rounds, say=say)
        right = ("forward GFLOP", "backward GFLOP", "operations/full", "seconds", "time/full", "efficiency")
        rows = [
            (
                r.method,
                r.level,
                f"{r.forward / 1e9:.2f}",
                f"{r.backward / 1e9:.2f}",
                ratio(r.of_flops),
                f"{r.seconds:.4f}",
                ratio(r.ratio),
                f"{r.efficiency:.2f}",
            )
            for r in found.rows
        ]
        table(("method", "level", *right), rows, right=right)
    conclude("step", found.to_dict(), found.goals(), as_json=as_json, check=check, check_times=check_times)
