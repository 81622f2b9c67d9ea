"""``torchgraft bench compile``: graph breaks, bytes and time of compiled models."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import results_only, table, working
from ..options import AsJson
from .options import Batch, ChannelsLast, Check, Device, DType, Levels, Methods, Model, Rounds, Side
from .output import conclude, mib, ratio

EXAMPLES = """\
torchgraft bench compile resnet18 --batch 2 --image-size 64
torchgraft bench compile convnext_tiny --methods conv-adapter --backend aot_eager --check"""


def run(
    model: Model,
    methods: Methods = None,
    levels: Levels = None,
    batch: Batch = 8,
    image_size: Side = 128,
    dtype: DType = "fp32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="Backend of torch.compile; aot_eager writes no code.")
    ] = "inductor",
    rounds: Rounds = 5,
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Compare MODEL under torch.compile with MODEL in eager mode, by method and level.

    Graph breaks, MiB that are kept for the backward, the time of a compiled forward and backward relative to an
    eager one, and the largest difference of a gradient. Compiling takes minutes.
    """
    with results_only(as_json):
        import dataclasses

        import torch

        from torchgraft.bench.compiling import goals, measure
        from torchgraft.bench.subjects import Setting, as_list

        setting = Setting(model, batch, image_size, dtype, device, channels_last)
        named = as_list(methods, ("conv-adapter",))
        chosen = as_list(levels, ("plain", "exact"))
        with working(f"compiling {model}") as tell:
            rows = measure(setting, named, chosen, backend=backend, rounds=rounds, say=tell)
        numbers = ("breaks", "eager MiB", "compiled MiB", "time", "difference")
        cells = [
            (r.method, r.level, r.breaks, mib(r.eager), mib(r.compiled), ratio(r.time), f"{r.difference:.1e}")
            for r in rows
        ]
        table(("method", "level", *numbers), cells, right=numbers)
    payload = {
        **setting.to_dict(),
        "torch": torch.__version__,
        "backend": backend,
        "rows": [dataclasses.asdict(r) for r in rows],
    }
    conclude("compile", payload, goals(rows), as_json=as_json, check=check)
