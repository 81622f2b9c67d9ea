"""``torchgraft bench prefix``: what it is worth to keep what lies below the first trained stage."""

from __future__ import annotations

from ..console import results_only, say, table, working
from ..options import AsJson
from .options import Batch, ChannelsLast, Check, CheckTimes, Device, DType, Method, Model, Rounds, Side
from .output import conclude, mib, ratio

EXAMPLES = """\
torchgraft bench prefix resnet50
torchgraft bench prefix vit_small_patch16_224 --method lora --image-size 224
torchgraft bench prefix efficientnet_lite0 --rounds 9 --json"""


def run(
    model: Model,
    method: Method = "conv-adapter[reduction=4]",
    batch: Batch = 8,
    image_size: Side = 128,
    dtype: DType = "fp32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    rounds: Rounds = 5,
    check: Check = False,
    check_times: CheckTimes = False,
    as_json: AsJson = False,
) -> None:
    """Compare training of MODEL from each stage on, from images and from kept activations.

    Per first trained stage: what is kept of an image (float16), what a batch keeps for the backward, the time of a
    step relative to full fine-tuning, and what float16 changes of the gradients. From float32 the gradients are the
    very same.
    """
    with results_only(as_json):
        from torchgraft.bench.prefix import prefixes
        from torchgraft.bench.subjects import Setting

        setting = Setting(model, batch, image_size, dtype, device, channels_last)
        with working(f"timing {model}") as show:
            found = prefixes(setting, method, rounds=rounds, say=show)
        right = ("kB an image", "of RGB", "saved MiB", "from the cut", "time/full", "from the cut ", "fp16 error")
        rows = [
            (
                r.first,
                r.cut,
                f"{r.bytes_per_image / 1e3:,.1f}",
                ratio(r.of_image),
                mib(r.saved),
                mib(r.saved_cached),
                ratio(r.plain),
                f"{r.cached:.4f}",
                f"{r.error:.0e}",
            )
            for r in found.rows
        ]
        table(("trained", "cut", *right), rows, right=right)
        for first, reason in found.refused.items():
            say(f"{first}: {reason}")
    conclude("prefix", found.to_dict(), found.goals(), as_json=as_json, check=check, check_times=check_times)
