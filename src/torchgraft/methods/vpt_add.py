"""VPT's prompts that are added to the tokens (Jia et al., ECCV 2022, ablation "add"). arXiv 2203.12119.

    add      E <- E + T_0, T_0 of shape (1 + N, d): a vector for every position, class token included
    add-1    E <- E + t_0, t_0 of shape (1, d): one vector for all of them
    deep     the same again in front of layers 2 to L, with T_(l-1)

The number of tokens stays, so models that mix a fixed number of them (MLP-Mixer) and those that add a bias per pair of
positions take it too. With ``add`` the prompts are tied to the size of the image.

Parameters: ``add`` (1 + N) d, ``add-1`` d; deep: in every layer; with a projection m in place of d, and m d + d.
ViT-B/16: 151,296 and 768; deep 1,815,552 and 9,216. Not mergeable: a sum with tokens is no change of a weight. Start:
U(-v, v), v = sqrt(6 / (3 ph pw + m)) for patches of ph x pw pixels, so not the pretrained network.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..core.anatomy import Anatomy
from ..core.blocks import class_name
from ..core.method import Method, register
from ..core.placements import Placement, Point, Stream
from ..errors import GraftError
from .forms.prompts import AddedPrompts, Prompts, Row, prompt_bound
from .forms.token_series import chosen_blocks, holds_tokens, patch_size, selected_blocks


@register("vpt-add")
@dataclasses.dataclass(frozen=True)
class VPTAdd(Method):
    """Config of added prompts.

    Attributes:
        location: ``"add"``: one prompt per position; ``"add-1"``: one for all positions.
        deep: Also in front of every further block.
        project: Width m of the prompts, mapped to that of the model by a linear layer; null: that of the model.
        dropout: Rate at which values of the prompts are dropped in training.
        num_layers: Deep prompts in the first so many blocks only; null: all.
        reverse: In the last ``num_layers`` blocks only.
        shared: All blocks share one set of prompts.
    """

    location: Literal["add", "add-1"] = "add"
    deep: bool = False
    project: int | None = None
    dropout: float = 0.0
    num_layers: int | None = None
    reverse: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if self.project is not None and self.project < 1:
            raise GraftError(f"vpt-add: project={self.project} is not valid; expected a width of at least 1")
        if not 0 <= self.dropout < 1:
            raise GraftError(f"vpt-add: dropout={self.dropout} is not valid; expected a rate from 0 to below 1")
        if self.num_layers is not None and self.num_layers < 1:
            raise GraftError(f"vpt-add: num_layers={self.num_layers} is not valid; expected at least 1 block")
        if not self.deep and (self.num_layers is not None or self.reverse or self.shared):
            raise GraftError("vpt-add: num_layers, reverse and shared need deep=true; set it or leave them out")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """A sum in front of the first block, or of every chosen one."""
        blocks = selected_blocks(anatomy, self.name)
        foreign = next((b for b in blocks if not self._fits(anatomy, b)), None)
        if foreign is not None:
            raise GraftError(
                f"{self.name}: {class_name(anatomy.module(foreign))} of {class_name(anatomy.model)} works on maps of a "
                "ConvNet, which hold no tokens; use vpt-pad or vpt-below"
            )
        chosen = chosen_blocks(self.name, len(blocks), self.num_layers, self.reverse) if self.deep else [0]
        sizes = [anatomy.shape(Point(b, "input"))[1:] for b in blocks]
        widths = {size[-1] for size in sizes}
        if len(widths) > 1 and (self.project is not None or self.shared):
            option = "project" if self.project is not None else "shared"
            raise GraftError(f"{self.name}: {option} needs blocks of one width, and here there are {sorted(widths)}")
        rows: dict[int, Row] = {}
        deep: dict[str, tuple[int, int, int]] = {}
        groups = list(dict.fromkeys(sizes))
        for i in chosen:
            if self.shared or (i == 0 and not self.reverse):
                rows[i] = None
                continue
            key = str(groups.index(sizes[i]))
            rows[i] = key, deep.get(key, (0,))[0]
            deep[key] = (deep.get(key, (0,))[0] + 1, *self._size(sizes[i]))
        # The published bound takes the width of the first stage at all of them.
        bound = prompt_bound(patch_size(anatomy, Point(blocks[0], "input")), self.project or sizes[0][-1])
        first = self._size(sizes[chosen[0]]) if None in rows.values() else None
        project = None if self.project is None else (self.project, sizes[0][-1])
        prompts = Prompts(first, deep, bound=bound, project=project)
        return [
            Stream(AddedPrompts(prompts, rows[i], dropout=self.dropout, name=self.name), Point(blocks[i], "input"))
            for i in chosen
        ]

    def _size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(prompts, width) of a block whose images have this shape."""
        positions = 1
        for n in shape[:-1]:
            positions *= n
        return (positions if self.location == "add" else 1), self.project or shape[-1]

    @staticmethod
    def _fits(anatomy: Anatomy, block: str) -> bool:
        """Whether a block works on tokens: a sequence, or a map of them that attention mixes."""
        shape = anatomy.shapes(block)[0]
        if shape is None or holds_tokens(anatomy, block):
            return shape is not None
        last = anatomy.layout(Point(block, "input")).name == "N...C"
        return last and bool(anatomy.inside(block, "attn"))
