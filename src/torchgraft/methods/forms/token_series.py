"""Where prompt tokens can stand: a series of blocks over one sequence of tokens."""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.blocks import class_name, inner_modules
from ...core.graft import RESERVED
from ...core.layers import is_conv
from ...core.placements import Point, Tokens
from ...core.placements.positioned_attention import reader_of
from ...errors import GraftError
from .rehearsal import rehearse

_POSITIONS = re.compile(r"rel(ative)?_?pos|(attn|attention)_?bias|pos(ition)?_bias|rpe")
"""Names of what holds one value per pair of positions inside an attention module."""


@dataclasses.dataclass(frozen=True)
class TokenSeries:
    """A run of blocks over one sequence of tokens.

    Attributes:
        blocks: Paths of the selected blocks, which follow one another.
        biased: For every block its attention modules that add a bias per pair of positions, by path.
        prefix: Number of tokens in front that are no patches (class, distillation, registers).
        length: Number of tokens.
        width: Their width d.
        patch: Height and width of a patch in pixels.
    """

    blocks: tuple[str, ...]
    biased: tuple[dict[str, nn.Module], ...]
    prefix: int
    length: int
    width: int
    patch: tuple[int, int]

    def placed(self, form: nn.Module, first: int, last: int, **options: object) -> Tokens:
        """Prompts that enter at the block of index ``first`` and leave behind that of index ``last``."""
        within = range(first, last + 1)
        return Tokens(
            form,
            self.blocks[first],
            self.blocks[last],
            prefix=self.prefix,
            through=self.blocks[first + 1 : last + 1],
            biased={path: module for i in within for path, module in self.biased[i].items()},
            **options,  # type: ignore[arg-type]
        )


def token_series(anatomy: Anatomy, name: str) -> TokenSeries:
    """The series of blocks that prompts can be put into.

    Raises:
        GraftError: The model has none; says what it has instead.
    """
    blocks = selected_blocks(anatomy, name)
    start = Point(blocks[0], "input")
    model = class_name(anatomy.model)
    if not holds_tokens(anatomy, blocks[0]):
        raise GraftError(
            f"{name}: the blocks of {model} work on maps, not on a sequence of tokens, so no prompt can stand beside "
            "the patches; use vpt-pad or vpt-below"
        )
    layout, shape = anatomy.layout(start), anatomy.shape(start)
    same = [b for b in blocks if _shapes(anatomy, b) == {shape}]
    if same != blocks[: len(same)] or any(_shapes(anatomy, b) != {shape} for b in blocks[: len(same)]):
        raise GraftError(f"{name}: the token sequences of {model} change from block to block, so prompts have no place")
    biased = tuple(_attentions(anatomy, b, name) for b in same)
    series = TokenSeries(tuple(same), biased, layout.prefix, shape[1], shape[2], patch_size(anatomy, start))
    if not any(biased):
        device, dtype = next((p.device, p.dtype) for p in anatomy.model.parameters())
        wrong = rehearse(anatomy, series.placed(_Blank(series.width, device, dtype), 0, len(same) - 1))
        if wrong is not None:
            raise GraftError(f"{name}: {model} does not run with more tokens than {shape[1]} ({wrong})")
    return series


def chosen_blocks(name: str, blocks: int, number: int | None, reverse: bool) -> list[int]:
    """Indices of the first ``number`` of ``blocks`` blocks, or of the last ones; all where it is None.

    Raises:
        GraftError: There are not so many.
    """
    number = number or blocks
    if number > blocks:
        raise GraftError(f"{name}: num_layers={number}, and {blocks} blocks are selected; give at most {blocks}")
    return list(range(blocks))[blocks - number :] if reverse else list(range(number))


def holds_tokens(anatomy: Anatomy, block: str) -> bool:
    """Whether a block works on a sequence of tokens (B, N, d), whatever mixes them."""
    shape = anatomy.shapes(block)[0]
    return shape is not None and len(shape) == 3 and anatomy.layout(Point(block, "input")).name == "NLC"


def patch_size(anatomy: Anatomy, point: Point) -> tuple[int, int]:
    """Height and width in pixels of what one token at ``point`` stands for."""
    assert anatomy.trace is not None and anatomy.trace.input is not None
    shape = anatomy.shape(point)
    layout = anatomy.layout(point)
    grid = shape[1:3] if len(shape) == 4 else layout.grid
    if grid is None:
        side = round((shape[1] - layout.prefix) ** 0.5)
        grid = side, side
    high, wide = (round(pixels / n) for pixels, n in zip(anatomy.trace.input[2:], grid, strict=True))
    return high, wide


def reads_image(anatomy: Anatomy, name: str) -> None:
    """Refuse a model whose first layer reads no image.

    Raises:
        GraftError: Says so.
    """
    stem = None if anatomy.stem is None else anatomy.module(anatomy.stem)
    seen = anatomy.trace is not None and anatomy.trace.input is not None and len(anatomy.trace.input) == 4
    if not seen or stem is None or not is_conv(stem):
        raise GraftError(
            f"{name}: {class_name(anatomy.model)} reads no image, and visual prompts stand beside the patches of one; "
            "use a method for text models, or give `example=` if it does read images"
        )


def selected_blocks(anatomy: Anatomy, name: str) -> list[str]:
    """The selected blocks of a model that reads images; they follow one another.

    Raises:
        GraftError: The model reads no image, or no such run of blocks is selected.
    """
    reads_image(anatomy, name)
    blocks = [s.path for s in anatomy.find("block")]
    if not blocks:
        raise GraftError(
            f"{name}: {class_name(anatomy.model)} has no block over tokens, or none is selected; use vpt-pad or "
            "vpt-below, or see `torchgraft list sites`"
        )
    known = [b.path for b in anatomy.blocks]
    start = known.index(blocks[0])
    if known[start : start + len(blocks)] != blocks:
        raise GraftError(f"{name}: the selected blocks do not follow one another; include a run such as 'blocks[4:]'")
    return blocks


def _shapes(anatomy: Anatomy, block: str) -> set[tuple[int, ...]]:
    return {anatomy.shape(Point(block, "input")), anatomy.shape(Point(block, "output"))}


def _attentions(anatomy: Anatomy, block: str, name: str) -> dict[str, nn.Module]:
    """The attention modules of a block whose bias has to grow with the sequence.

    Raises:
        GraftError: The block mixes tokens by something else, or by a bias of unknown form.
    """
    kind, attentions = class_name(anatomy.module(block)), anatomy.inside(block, "attn")
    if not attentions:
        raise GraftError(
            f"{name}: {kind} mixes its tokens by a layer over a fixed number of them, not by attention, so the "
            "sequence cannot grow; use vpt-add"
        )
    biased = {}
    for site in attentions:
        module = anatomy.module(site.path)
        held = [n for n, _ in (*module.named_parameters(), *module.named_buffers()) if RESERVED not in n.split(".")]
        tables = [n for n in (*held, *(p for p, _ in inner_modules(module))) if _POSITIONS.search(n)]
        if reader_of(module) is not None:
            biased[site.path] = module
        elif tables:
            raise GraftError(
                f"{name}: {class_name(module)} in {kind} adds a bias for each pair of its positions ({tables[0]}), "
                "which a longer sequence does not fit; use vpt-add"
            )
    return biased


class _Blank(nn.Module):
    """One prompt of zeros, to rehearse with."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = torch.zeros(1, width, device=device, dtype=dtype)

    def forward(self) -> Tensor:
        return self.value
