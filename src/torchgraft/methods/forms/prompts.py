"""Prompts: learned vectors that stand beside (or are added to) the tokens of a frozen transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import GraftError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Row = tuple[str, int] | None
"""One block's prompts in a :class:`Prompts`: (key, row) of the deep ones; None: the first ones."""


def prompt_bound(patch: tuple[int, int], width: int) -> float:
    """``v`` of the start U(-v, v): sqrt(6 / (3 ph pw + m)), Xavier's for a linear patch embedding (arXiv 2203.12119).

    Args:
        patch: Height and width of a patch in pixels (ph, pw).
        width: Width of the prompts (m).
    """
    return math.sqrt(6 / (3 * patch[0] * patch[1] + width))


class Prompts(nn.Module):
    """The prompts of all blocks of one model, with the projection that they share.

    Shapes: a :data:`Row` -> (P, d).
    Parameters: ``P m`` for the first, ``rows P m`` per group of deep ones; with a projection also ``m d + d``.

    Args:
        first: (P, m) of the prompts in front of the first block; None: there are none.
        deep: Key -> (rows, P, m); every row belongs to one block.
        bound: Start values are U(-bound, bound).
        project: Width d of the model where the prompts have another width m; a linear layer with bias, its weight
            Kaiming-normal (fan out), maps them.
    """

    def __init__(
        self,
        first: tuple[int, int] | None,
        deep: Mapping[str, tuple[int, int, int]],
        *,
        bound: float,
        project: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.first = None if first is None else nn.Parameter(torch.empty(first).uniform_(-bound, bound))
        self.deep = nn.ParameterDict(
            {key: nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for key, shape in deep.items() if shape[0]}
        )
        self.project = None if project is None else nn.Linear(*project)
        if self.project is not None:
            nn.init.kaiming_normal_(self.project.weight, mode="fan_out")

    def forward(self, row: Row) -> Tensor:
        """The prompts of one block."""
        # A copy: a view of a parameter that is made without gradients would still claim to require one.
        value = self.first if row is None else self.deep[row[0]][row[1]].clone()
        assert value is not None
        return value if self.project is None else F.linear(value, self.project.weight, self.project.bias)


class PromptsOf(nn.Module):
    """The prompts of one block, as a form without an input.

    Shapes: () -> (P, d).
    Parameters: those of ``prompts``, which the forms of several blocks share.

    Args:
        prompts: All prompts of the model.
        row: Which of them.
    """

    def __init__(self, prompts: Prompts, row: Row) -> None:
        super().__init__()
        self.prompts, self.row = prompts, row

    def forward(self) -> Tensor:
        """The prompts (P, d)."""
        return self.prompts(self.row)


class PromptsByBlock(nn.Module):
    """The prompts of every block, by its index.

    Shapes: index -> (P, d).
    Parameters: those of ``prompts``.

    Args:
        prompts: All prompts of the model.
        rows: Index of a block -> which of them.
    """

    def __init__(self, prompts: Prompts, rows: Mapping[int, Row]) -> None:
        super().__init__()
        self.prompts, self.rows = prompts, dict(rows)

    def forward(self, index: int) -> Tensor:
        """The prompts (P, d) of a block."""
        return self.prompts(self.rows[index])


class PixelPrompts(nn.Module):
    """Prompts that are patches of an image: a strip of P patches that the frozen patch embedding turns into tokens.

    Shapes: () -> (P, d).
    Parameters: ``3 p p P`` for patches of p x p pixels.

    Args:
        embedding: The backbone's patch embedding, a convolution without overlap; it stays the backbone's.
        count: Number of prompts P.
        bound: Start values are U(-bound, bound).
        start: ``"pixel"``: these; ``"pixel-gaussian"``: N(0, 1); ``"pixel-imagenet"``: U(0, 1), normalised by the
            statistics of ImageNet in every forward.
    """

    def __init__(self, embedding: nn.Module, count: int, *, bound: float, start: str) -> None:
        super().__init__()
        high, wide = embedding.kernel_size  # type: ignore[misc]
        pixels = torch.empty(1, int(embedding.in_channels), high, wide * count)  # type: ignore[arg-type]
        self.norm = ImageNetNorm(pixels.shape[1]) if start == "pixel-imagenet" else nn.Identity()
        if start == "pixel-gaussian":
            pixels.normal_()
        elif start == "pixel-imagenet":
            pixels.uniform_(0, 1)
        else:
            pixels.uniform_(-bound, bound)
        self.pixels = nn.Parameter(pixels)
        # In a tuple: assigned as it is, it would become a child, and its weight a part of the adapter.
        self.embedding = (embedding,)

    def forward(self) -> Tensor:
        """The prompts (P, d)."""
        return self.embedding[0](self.norm(self.pixels)).flatten(2)[0].t()


class ImageNetNorm(nn.Module):
    """Normalise raw pixels (in [0, 1]) by the statistics of ImageNet; other than three channels by their mean.

    Shapes: (N, channels, H, W) -> the same.
    Parameters: none.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, *, by_channel: bool = True) -> None:
        super().__init__()
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            own = torch.tensor(values)
            own = own if channels == 3 and by_channel else own.mean().expand(channels)
            self.register_buffer(name, own.reshape(-1, 1, 1).clone(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise (N, channels, H, W)."""
        return (pixels - self.mean) / self.std


class AddedPrompts(nn.Module):
    """Prompts to be added to the tokens: one per position, or one for all of them.

    Shapes: tokens (B, N, d) or (B, H, W, d) -> what is added to them.
    Parameters: those of ``prompts``.

    Args:
        prompts: All prompts of the model; those of a block are (N, d), (H W, d) or (1, d).
        row: Which of them.
        dropout: Rate at which values are dropped in training, in each image apart.
        name: The method, for the error.
    """

    def __init__(self, prompts: Prompts, row: Row, *, dropout: float, name: str) -> None:
        super().__init__()
        self.prompts, self.row, self.name = prompts, row, name
        self.dropout = dropout

    def forward(self, h: Tensor) -> Tensor:
        """What is added to ``h``."""
        value = self.prompts(self.row).to(h.dtype)
        positions = h.shape[1:-1].numel()
        if value.shape[0] not in (1, positions):
            raise GraftError(
                f"{self.name}: made for {value.shape[0]} positions and got {positions}; resize the images to the size "
                "it was attached with, or use location=add-1"
            )
        shape = h.shape[1:] if value.shape[0] > 1 else (*[1] * (h.dim() - 2), h.shape[-1])
        value = value.reshape(shape).clone()
        if not (self.training and self.dropout):
            return value
        return F.dropout(value.expand(h.shape[0], *shape), self.dropout)


class KeptTokens(nn.Module):
    """Some of the tokens behind the prefix, by position.

    Shapes: (B, N, d) -> (B, N', d).
    Parameters: none.

    Args:
        prefix: Number of tokens that always stay.
        kept: Which of the others stay.
    """

    def __init__(self, prefix: int, kept: slice) -> None:
        super().__init__()
        self.prefix, self.kept = prefix, kept

    def forward(self, x: Tensor) -> Tensor:
        """Leave out the others."""
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :][:, self.kept]], 1)
