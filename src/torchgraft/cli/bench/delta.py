"""``torchgraft bench delta``: size of an adapter's file by storage type."""

from __future__ import annotations

from ..console import results_only, table, working
from ..options import AsJson
from .options import Batch, Check, Method, Model, Side
from .output import conclude

EXAMPLES = """\
torchgraft bench delta resnet50
torchgraft bench delta vit_small_patch16_224 --method lora --check
torchgraft bench delta convnext_tiny --json"""


def run(
    model: Model,
    method: Method = "conv-adapter[reduction=4]",
    batch: Batch = 8,
    image_size: Side = 224,
    check: Check = False,
    as_json: AsJson = False,
) -> None:
    """Compare the files of an adapter of MODEL by storage type.

    The adapter is saved in every type and loaded again: its file in bytes and relative to the full model's, the
    largest relative change of an output, and the part of predictions that stay the same.
    """
    with results_only(as_json):
        from torchgraft.bench.delta import stored
        from torchgraft.bench.subjects import Setting

        with working(f"saving {method}") as say:
            found = stored(Setting(model, batch, image_size), method, say=say)
        right = ("file bytes", "of full", "output change", "same class")
        rows = [
            (r.dtype, f"{r.file:,}", f"1/{1 / r.of_full:.0f}", f"{r.change:.1e}", f"{r.same:.3f}") for r in found.rows
        ]
        table(("stored as", *right), [("full model", f"{found.full:,}", "1", None, None), *rows], right=right)
    conclude("delta", found.to_dict(), found.goals(), as_json=as_json, check=check)
