"""``torchgraft bench layers``: what PyTorch keeps of frozen layers, what is needed, and what torchgraft keeps."""

from __future__ import annotations

from ..console import results_only, table, working
from ..options import AsJson
from .options import ChannelsLast, Check, Device, DType
from .output import conclude

EXAMPLES = """\
torchgraft bench layers --check
torchgraft bench layers --dtype bf16 --channels-last"""


def run(
    dtype: DType = "fp32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Show what a frozen layer keeps for the backward, relative to its input.

    By the torch that is installed: what PyTorch keeps, what an exact backward needs, and what torchgraft keeps at
    level exact.
    """
    with results_only(as_json):
        import dataclasses

        import torch

        from torchgraft.bench.layers import measure
        from torchgraft.bench.subjects import DTYPES

        with working("measuring layers"):
            rows = measure(DTYPES[dtype], device, channels_last=channels_last)
        titles = ("torch", "needed", "torchgraft")
        cells = [(r.layer, *(f"{v:.3f}" for v in (r.plain, r.needed, r.lean))) for r in rows]
        table(("kept / input", *titles), cells, right=titles)
    payload = {
        "torch": torch.__version__,
        "dtype": dtype,
        "device": device,
        "channels_last": channels_last,
        "rows": [dataclasses.asdict(r) for r in rows],
    }
    missed = [g for g in (r.goal() for r in rows) if not g.met]
    conclude("layers", payload, missed, as_json=as_json, check=check)
