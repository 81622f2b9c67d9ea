"""``torchgraft bench equal``: what the levels and folding change of gradients and outputs."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import results_only, table, working
from ..options import AsJson
from .options import Batch, ChannelsLast, Check, Device, DType, Levels, Model, Side
from .output import conclude

EXAMPLES = """\
torchgraft bench equal resnet50 conv-adapter --check
torchgraft bench equal convnext_tiny ssf --image-size 64 --levels exact,compact
TORCHGRAFT_LEAN_NAN=1 torchgraft bench equal resnet18 lora --check    what is dropped is never read"""


def run(
    model: Model,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Method with options, as in NAME[KEY=VALUE].")],
    levels: Levels = None,
    batch: Batch = 2,
    image_size: Side = 224,
    dtype: DType = "fp32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Compare gradients and outputs of METHOD on MODEL under every level.

    Levels are held against the same folded model without lean layers: exact, recompute and checkpoint must differ by
    nothing, compact by at most 1e-2. Folding alone is held against the model as it is usually coded. Gradient is the
    largest relative difference of a trained tensor's gradient, output that of an output.
    """
    with results_only(as_json):
        from torchgraft.bench.equal import PROMISES, differences
        from torchgraft.bench.subjects import Setting, as_list

        setting = Setting(model, batch, image_size, dtype, device, channels_last)
        with working(f"comparing {method} on {model}") as say:
            found = differences(setting, method, as_list(levels, PROMISES), say=say)
        right = ("gradient", "output")
        rows = [(r.level, f"{r.gradient:.2g}", f"{r.output:.2g}", r.where) for r in found.rows]
        table(("level", *right, "largest at"), rows, right=right)
    conclude("equal", found.to_dict(), found.goals(), as_json=as_json, check=check)
