"""Where prompt tokens pass in a transformer over shifted windows (Swin)."""

from __future__ import annotations

import re
from typing import Literal

from ...core.anatomy import Anatomy
from ...core.blocks import class_name
from ...core.layers import is_norm
from ...core.placements import Point, WindowPath, WindowTokens
from ...core.placements.positioned_attention import reader_of
from ...core.placements.window_tokens import Pool
from ...errors import GraftError
from .prompts import Prompts, PromptsByBlock, Row, prompt_bound
from .token_series import patch_size, selected_blocks

_AVERAGE = re.compile(r"^(Fast)?AdaptiveAvgPool([12]d)?$")
_WINDOWED = {"WindowAttention", "ShiftedWindowAttention", "SwinAttention"}


def window_path(anatomy: Anatomy, name: str) -> WindowPath | None:
    """The way of prompts through a transformer over shifted windows; None where the model is none.

    Raises:
        GraftError: The model is one of an unknown class, or the selected blocks do not follow one another.
    """
    found = anatomy.find("block")
    inside = {b.path: anatomy.inside(b.path, "attn") for b in found}
    if not found or not any("Window" in s.kind or "Swin" in s.kind for sites in inside.values() for s in sites):
        return None
    blocks = selected_blocks(anatomy, name)
    attentions = [next((s.path for s in inside[b]), "") for b in blocks]
    unknown = next((b for b, a in zip(blocks, attentions, strict=True) if not a or not _is_swin(anatomy, a)), None)
    if unknown is not None:
        kind = class_name(anatomy.module(unknown))
        raise GraftError(
            f"{name}: the windows of {class_name(anatomy.model)} ({kind}) are not those of Swin (V1), and how prompts "
            "pass other kinds is not defined; use vpt-pad, vpt-below or another method"
        )
    assert anatomy.trace is not None
    order = sorted(anatomy.trace.calls, key=lambda p: anatomy.trace.calls[p].order)  # type: ignore[union-attr]
    mergings: dict[int, str] = {}
    stages: dict[int, str] = {}
    for i in range(1, len(blocks)):
        between = order[order.index(blocks[i - 1]) + 1 : order.index(blocks[i])]
        merging = next((p for p in between if class_name(anatomy.module(p)).endswith("PatchMerging")), None)
        if merging is not None:
            mergings[i] = merging
            holder = merging.rpartition(".")[0]
            if class_name(anatomy.module(holder)) == "SwinStage":
                stages[i] = holder
    whole = blocks[-1] == anatomy.blocks[-1].path
    behind = order[order.index(blocks[-1]) + 1 :] if whole else []
    norm = next((p for p in behind if is_norm(anatomy.module(p))), None)
    pool = next((p for p in behind if _AVERAGE.search(class_name(anatomy.module(p)))), None)
    both = norm is not None and pool is not None
    return WindowPath(
        {path: anatomy.module(path) for path in blocks},
        {path: anatomy.module(path) for path in attentions},
        mergings,
        stages,
        norm if both else None,
        pool if both else None,
    )


def window_tokens(
    anatomy: Anatomy,
    path: WindowPath,
    count: int,
    fresh: list[int],
    expand: bool,
    dropout: float,
    pool: Pool | Literal["auto"],
) -> WindowTokens:
    """``count`` prompts for the blocks of indices ``fresh``, in one group per stage, as in the published code.

    The other arguments are those of :class:`WindowTokens`; ``pool="auto"`` averages over prompts and patches, as
    published.
    """
    points = [Point(block, "input") for block in path.blocks]
    widths = [anatomy.channels(p, anatomy.layout(p)) for p in points]
    stage = 0
    rows: dict[int, Row] = {}
    deep: dict[str, tuple[int, int, int]] = {}
    for i in range(len(widths)):
        stage += i in path.mergings
        key = str(stage)
        if i == 0 and i in fresh:
            rows[i] = None
        elif i in fresh:
            number = deep.get(key, (0,))[0]
            rows[i], deep[key] = (key, number), (number + 1, count, widths[i])
    # The published bound takes the width of the first stage at all of them.
    bound = prompt_bound(patch_size(anatomy, points[0]), widths[0])
    prompts = Prompts((count, widths[0]) if 0 in fresh else None, deep, bound=bound)
    form = PromptsByBlock(prompts, rows)
    over: Pool = "all" if pool == "auto" else pool
    return WindowTokens(form, path, count, fresh=fresh, expand=expand, dropout=dropout, pool=over)


def _is_swin(anatomy: Anatomy, path: str) -> bool:
    module = anatomy.module(path)
    return reader_of(module) is not None and class_name(module) in _WINDOWED
