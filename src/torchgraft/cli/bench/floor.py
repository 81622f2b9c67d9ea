"""``torchgraft bench floor``: the fewest bytes that an exact backward needs, and what is kept beyond them."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import results_only, say, table, working
from ..options import AsJson
from .options import Batch, ChannelsLast, Check, Device, DType, Levels, Model, Side
from .output import conclude, mib, ratio

EXAMPLES = """\
torchgraft bench floor resnet50 "conv-adapter[reduction=4]" --check
torchgraft bench floor convnext_tiny ssf --levels plain,exact,recompute --fake
torchgraft bench floor vit_small_patch16_224 lora --batch 2 --json"""


def run(
    model: Model,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Method with options, as in NAME[KEY=VALUE].")],
    levels: Levels = None,
    batch: Batch = 8,
    image_size: Side = 224,
    dtype: DType = "fp32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    fake: Annotated[
        bool, typer.Option("--fake", help="Measure on tensors without data: the same bytes in a moment.")
    ] = False,
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Hold what METHOD keeps on MODEL against the fewest bytes that an exact backward needs.

    The floor is counted from the kinds of the operators and the sizes of their tensors, in MiB and by what it is
    kept for. Then come what each level keeps for the backward, and, for the last level, the layers that keep
    more than they have to.
    """
    with results_only(as_json):
        import torchgraft as tg
        from torchgraft.bench.excess import compare
        from torchgraft.bench.subjects import Setting, as_list

        tg.method(method)  # a mistake in it is told before anything is measured
        setting = Setting(model, batch, image_size, dtype, device, channels_last)
        with working(f"measuring {model}") as tell:
            found = compare(setting, method, as_list(levels, ("plain", "exact")), fake=fake, say=tell)
        parts = [(f"floor: {part}", mib(count), None) for part, count in found.floor.parts().items()]
        whole = ("floor", mib(found.floor.bytes), ratio(1))
        kept = [(r.level, mib(r.bytes), ratio(found.ratio(r))) for r in found.reached]
        table(("", "MiB", "of floor"), [*parts, whole, *kept], right=("MiB", "of floor"))
        if found.reached:
            last = found.reached[-1]
            say()
            titles = ("kept beyond", "spared")
            rows = [(name, mib(more), mib(less)) for name, (more, less) in last.beyond.items() if more != less]
            table((f"layers at level {last.level}", *titles), rows, right=titles)
    conclude("floor", found.to_dict(), found.goals(), as_json=as_json, check=check)
