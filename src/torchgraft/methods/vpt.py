"""VPT, Visual Prompt Tuning (Jia et al., ECCV 2022): learned tokens beside the patches. arXiv 2203.12119.

With E = [prefix; patches] + positions, P = ``num_tokens`` and T_l of shape (P, d):

    shallow   Z_0 = [prefix ; T_0 ; patches]                    Z_l = Layer_l(Z_(l-1))
    deep      the same, and before every further layer the outputs of the prompts make way for T_(l-1):
              Z_(l-1) <- [prefix ; T_(l-1) ; patches]

The prefix is all that is no patch (class, distillation and register tokens); prompts have no position. Dropout acts
on the prompts. With ``project`` = m they live in R^m and one linear layer maps them. On Swin every window attends to
its own copy of the prompts, whose outputs are averaged over the windows; a patch merging repeats them four times along
the channels. Behind the last block prompts are taken out again, so no model averages them with the patches, but for
Swin, whose published form does.

Parameters: shallow P d, deep L P d; with a projection (1 or L) P m + m d + d; on Swin the sum of P C over its blocks.
ViT-B/16: P = 5 3,840 and 46,080; P = 50 38,400 and 460,800. Swin-B, P = 50: 6,400 and 601,600. Not mergeable: prompts
lengthen the sequence. Start: U(-v, v), v = sqrt(6 / (3 ph pw + m)) for patches of ph x pw pixels, so not the
pretrained network.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..core.anatomy import Anatomy
from ..core.layers import is_conv
from ..core.method import Method, register
from ..core.placements import Placement, Point, Sequential
from ..errors import GraftError
from .forms.prompts import KeptTokens, PixelPrompts, Prompts, PromptsOf, Row, prompt_bound
from .forms.token_series import TokenSeries, chosen_blocks, token_series
from .forms.window_series import window_path, window_tokens

Pool = Literal["auto", "patches", "all", "prompts"]


@register("vpt-shallow")
@dataclasses.dataclass(frozen=True)
class VPTShallow(Method):
    """Config of VPT-shallow: prompts in front of the first block.

    Attributes:
        num_tokens: Number of prompts P.
        project: Width m of the prompts, mapped to that of the model by a linear layer; null: that of the model.
        dropout: Rate at which values of the prompts are dropped in training.
        start: ``"token"``: vectors. The others are patches of an image in front of the frozen patch embedding, drawn
            from U(-v, v) (``"pixel"``), N(0, 1) (``"pixel-gaussian"``) or U(0, 1) and normalised by ImageNet's
            statistics (``"pixel-imagenet"``).
        pool: What a model averages that averages its tokens: ``"patches"``, ``"prompts"``, or ``"all"`` (the published
            code on MAE and Swin); ``"auto"``: all on Swin, else patches.
    """

    num_tokens: int = 50
    project: int | None = None
    dropout: float = 0.0
    start: Literal["token", "pixel", "pixel-gaussian", "pixel-imagenet"] = "token"
    pool: Pool = "auto"

    def __post_init__(self) -> None:
        _check(self)
        if self.start != "token" and (self.project is not None or self.dropout):
            raise GraftError(f"vpt-shallow: start={self.start} has no projection and no dropout; leave them out")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One set of prompts, from the first block to the last."""
        path = window_path(anatomy, self.name)
        if path is not None:
            _no_options(self, start="token", project=None)
            return [window_tokens(anatomy, path, self.num_tokens, [0], True, self.dropout, self.pool)]
        series = token_series(anatomy, self.name)
        bound = prompt_bound(series.patch, self.project or series.width)
        if self.start == "token":
            size = self.num_tokens, self.project or series.width
            prompts = Prompts(size, {}, bound=bound, project=_projection(self, series))
            form: PromptsOf | PixelPrompts = PromptsOf(prompts, None)
        else:
            form = self._pixels(anatomy, series, bound)
        last = len(series.blocks) - 1
        strip = self.pool in ("auto", "patches")
        placed = series.placed(form, 0, last, dropout=self.dropout, strip=strip)
        return [placed, *([] if strip else _kept(series, self.num_tokens, self.pool))]

    def _pixels(self, anatomy: Anatomy, series: TokenSeries, bound: float) -> PixelPrompts:
        embedding: Any = anatomy.module(anatomy.stem or "")
        fits = is_conv(embedding) and embedding.kernel_size == embedding.stride == series.patch
        if not fits or embedding.out_channels != series.width or embedding.in_channels != 3:
            raise GraftError(
                f"{self.name}: start={self.start} needs a patch embedding that is one convolution of "
                f"{series.patch} pixels from 3 to {series.width} channels; use start=token"
            )
        return PixelPrompts(embedding, self.num_tokens, bound=bound, start=self.start)


@register("vpt-deep")
@dataclasses.dataclass(frozen=True)
class VPTDeep(Method):
    """Config of VPT-deep: fresh prompts in front of every block.

    Attributes:
        num_tokens: Number of prompts P of each block.
        project: Width m of the prompts, mapped to that of the model by a linear layer; null: that of the model.
        dropout: Rate at which values of the prompts are dropped in training (published: 0.1 on VTAB).
        num_layers: Only the first so many blocks get prompts of their own; null: all.
        reverse: Only the last ``num_layers`` blocks do.
        shared: All blocks share one set of prompts.
        noexpand: Behind the last block with prompts of its own they are taken out; otherwise its outputs stay.
        pool: As for :class:`VPTShallow`.
        official: Two oddities of the published code: with ``reverse`` the prompts overwrite the first P patches, and
            what is pooled is then, and with ``noexpand``, chosen by position, as if prompts stood there.
    """

    num_tokens: int = 50
    project: int | None = None
    dropout: float = 0.0
    num_layers: int | None = None
    reverse: bool = False
    shared: bool = False
    noexpand: bool = False
    pool: Pool = "auto"
    official: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if self.num_layers is not None and self.num_layers < 1:
            raise GraftError(f"vpt-deep: num_layers={self.num_layers} is not valid; expected at least 1 block")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """Prompts of their own for every chosen block."""
        path = window_path(anatomy, self.name)
        if path is not None:
            _no_options(self, project=None, shared=False, official=False)
            chosen = chosen_blocks(self.name, len(path.blocks), self.num_layers, self.reverse)
            return [window_tokens(anatomy, path, self.num_tokens, chosen, not self.noexpand, self.dropout, self.pool)]
        series = token_series(anatomy, self.name)
        end = len(series.blocks) - 1
        chosen = chosen_blocks(self.name, end + 1, self.num_layers, self.reverse)
        width = self.project or series.width
        rows: dict[int, Row] = dict.fromkeys(chosen, None)
        if not self.shared:
            rows |= {i: ("0", n) for n, i in enumerate(chosen if self.reverse else chosen[1:])}
        deep = sum(row is not None for row in rows.values())
        prompts = Prompts(
            (self.num_tokens, width) if None in rows.values() else None,
            {"0": (deep, self.num_tokens, width)},
            bound=prompt_bound(series.patch, width),
            project=_projection(self, series),
        )
        by_position = self.official and (self.reverse or (self.noexpand and chosen[-1] < end))
        strip = by_position or self.pool in ("auto", "patches") or (self.noexpand and chosen[-1] < end)
        placed: list[Placement] = []
        for i in chosen:
            final = i == chosen[-1]
            placed.append(
                series.placed(
                    PromptsOf(prompts, rows[i]),
                    i,
                    end if final and not self.noexpand else i,
                    dropout=self.dropout,
                    overwrite=self.official and self.reverse,
                    strip=strip or not final,
                )
            )
        if by_position or not strip:
            placed += _kept(series, self.num_tokens, "patches" if self.pool == "auto" else self.pool)
        return placed


def _kept(series: TokenSeries, count: int, pool: str) -> list[Placement]:
    """What of the tokens behind the prefix is left for the pooling, by position."""
    kept = {"patches": slice(count, None), "prompts": slice(0, count)}.get(pool)
    if kept is None:
        return []
    placed = Sequential(KeptTokens(series.prefix, kept), Point(series.blocks[-1], "output"), skip=False, slot="kept")
    placed.splits = False  # type: ignore[assignment]
    return [placed]


def _projection(config: VPTShallow | VPTDeep, series: TokenSeries) -> tuple[int, int] | None:
    return None if config.project is None else (config.project, series.width)


def _check(config: VPTShallow | VPTDeep) -> None:
    if config.num_tokens < 1:
        raise GraftError(f"{config.name}: num_tokens={config.num_tokens} is not valid; expected at least 1")
    if config.project is not None and config.project < 1:
        raise GraftError(f"{config.name}: project={config.project} is not valid; expected a width of at least 1")
    if not 0 <= config.dropout < 1:
        raise GraftError(f"{config.name}: dropout={config.dropout} is not valid; expected a rate from 0 to below 1")


def _no_options(config: Method, **defaults: Any) -> None:
    for option, default in defaults.items():
        if getattr(config, option) != default:
            raise GraftError(
                f"{config.name}: {option}={getattr(config, option)} is not defined on Swin, whose stages differ in "
                "width; leave it out"
            )
