"""Write docs/layer-kinds.md: what every placement says it can do at every kind of layer, and why not.

Run ``python docs/scripts/layer_table.py`` after a change of ``supports``. The tests compare the page with what
this script would write, and try every answer of it on a real layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import timm.layers as tl
from torch import nn

from torchgraft.core.layers import kind_of
from torchgraft.core.placements import PLACEMENTS, Placement

PAGE = Path(__file__).parents[1] / "layer-kinds.md"

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "`nn.Linear`": lambda: nn.Linear(4, 6),
    "`nn.Conv1d`": lambda: nn.Conv1d(4, 6, 3),
    "`nn.Conv2d`": lambda: nn.Conv2d(4, 6, 3),
    "`nn.Conv2d`, two groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "`nn.Conv2d`, depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "`nn.Conv2d`, dilation 2": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "`nn.Conv2d`, reflect padding": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "`nn.Conv2d`, circular padding": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "`nn.Conv3d`": lambda: nn.Conv3d(4, 6, 3),
    "`nn.ConvTranspose2d`": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
    "timm `Conv2dSame`": lambda: tl.Conv2dSame(4, 6, 3, stride=2),
    "timm `StdConv2d`": lambda: tl.StdConv2d(4, 6, 3),
    "timm `ScaledStdConv2d`": lambda: tl.ScaledStdConv2d(4, 6, 3),
    "`nn.BatchNorm2d`": lambda: nn.BatchNorm2d(4),
    "timm `BatchNormAct2d`": lambda: tl.BatchNormAct2d(4),
    "`nn.LayerNorm`": lambda: nn.LayerNorm(4),
    "timm `LayerNorm2d`": lambda: tl.LayerNorm2d(4),
    "`nn.RMSNorm`": lambda: nn.RMSNorm(4),
    "`nn.GroupNorm`": lambda: nn.GroupNorm(2, 4),
    "`nn.Embedding`": lambda: nn.Embedding(4, 6),
    "`nn.MultiheadAttention`": lambda: nn.MultiheadAttention(4, 2),
    "timm `Attention`": lambda: tl.Attention(4, num_heads=2),
    "`nn.TransformerEncoderLayer`": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "`nn.LSTM`": lambda: nn.LSTM(4, 4),
}


def page() -> str:
    """The text of the page."""
    notes: dict[str, int] = {}
    head = "| layer | kind | " + " | ".join(f"`{p.__name__}`" for p in PLACEMENTS.values()) + " |"
    rows = [head, "|---" * (len(PLACEMENTS) + 2) + "|"]
    for title, make in LAYERS.items():
        layer = make()
        cells = [_cell(placement, layer, notes) for placement in PLACEMENTS.values()]
        rows.append(f"| {title} | `{kind_of(layer)}` | {' | '.join(cells)} |")
    listed = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    return f"""# Layer kinds

Written by `docs/scripts/layer_table.py` from what the placements themselves say; the tests hold every answer
against a formula of its own.

* **merges**: it acts, and its effect can be folded into the layer's own weight.
* **acts**: it acts while the adapter is active, and cannot be folded.
* **-**: it is refused.

The numbers refer to the reasons below. A layer that its parent never calls (the `out_proj` of
`nn.MultiheadAttention`, `qkv` of torchvision's Swin, `qkv` of timm's BEiT) takes `WeightDelta` and `Train`, which
act wherever the weight is read; everything else is refused there by name.

{chr(10).join(rows)}

## Reasons

{listed}
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def _cell(placement: type[Placement], layer: nn.Module, notes: dict[str, int]) -> str:
    support = placement.supports(layer)
    if support.merge:
        return "merges"
    reason = support.reason.replace(type(layer).__name__, "the layer")  # one note for all layers it is true of
    number = notes.setdefault(reason, len(notes) + 1)
    return f"{'acts' if support.forward else '-'} ({number})"


if __name__ == "__main__":
    main()
