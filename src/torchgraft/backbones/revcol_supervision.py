"""RevCol's intermediate supervision: classifiers and decoders on the columns, and the compound loss.

At four columns, evenly spaced, a classifier reads c3; at the first three of them a decoder also rebuilds the image from
it ("Reversible Column Networks", arXiv:2212.11696). With n_f = 3 rebuilt images and n_c = 4 logits, over j = 0, 1, 2

    L = sum_j [(1 - j / n_f) f BCE(sigmoid(image_j), image) + (j + 1) / n_c c CE(logits_j)] + CE(logits_3)

so early columns are asked for the image and late ones for the class. Only pretraining uses it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, NormMlpClassifierHead
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ..errors import GraftError

__all__ = ["CompoundLoss", "Supervised", "Supervision", "compound_loss"]

PLACES = 4
"""Columns that are supervised, the last one included."""
FEW_CLASSES = 1000
"""Up to so many the image is rebuilt in steps."""
DARKEST, BRIGHTEST = 0.01, 0.99
"""Between these the loss wants the image."""


class Supervised(NamedTuple):
    """What a supervised forward returns.

    Attributes:
        logits: Four times (B, num_classes); the last are those of ``forward``.
        images: Three times (B, in_chans, H, W), in front of a sigmoid.
    """

    logits: list[Tensor]
    images: list[Tensor]


class CompoundLoss(NamedTuple):
    """The loss, a scalar, and the share of each supervised column (4,), whose sum it is."""

    loss: Tensor
    parts: Tensor


def compound_loss(
    found: Supervised,
    image: Tensor,
    target: Tensor,
    f_coe: float = 3.0,
    c_coe: float = 0.7,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> CompoundLoss:
    """The loss of a supervised forward.

    Args:
        found: What the network returned.
        image: The images (B, C, H, W) with values from 0 to 1, not normalised.
        target: Classes (B,), or their probabilities (B, num_classes).
        f_coe: Weight of the rebuilt images.
        c_coe: Weight of the early logits.
        criterion: Loss of logits; default: cross-entropy.

    Raises:
        GraftError: The images that were rebuilt have another size.
    """
    logits, images = found
    if any(rebuilt.shape != image.shape for rebuilt in images):
        raise GraftError(
            f"compound_loss: the image is {tuple(image.shape)} and was rebuilt as {tuple(images[0].shape)}; "
            "its sides must be multiples of 32"
        )
    image = image.clamp(DARKEST, BRIGHTEST)
    parts = []
    for j, rebuilt in enumerate(images):
        pixels = (1 - j / len(images)) * f_coe * F.binary_cross_entropy_with_logits(rebuilt, image)
        parts.append(pixels + (j + 1) / len(logits) * c_coe * criterion(logits[j], target))
    parts.append(criterion(logits[-1], target))
    shares = torch.stack(parts)
    return CompoundLoss(shares.sum(), shares)


class Step(nn.Module):
    """(B, C, h, w) -> (B, C', 2 h, 2 w): channels, norm, size, and a block without expansion."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(dim, out_dim, 1, **dd)
        self.norm = LayerNorm2d(out_dim, eps=1e-6, **dd)
        self.act = nn.GELU()
        self.block = ConvNeXtBlock(out_dim, kernel_size=3, mlp_ratio=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Twice the resolution."""
        x = self.act(self.norm(self.proj(x)))
        return self.block(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True))


class Decoder(nn.Module):
    """The image from the last map: (B, dims[3], h, w) -> (B, chans, 32 h, 32 w).

    Args:
        dims: Channels of the levels.
        chans: Channels of the image.
        stepwise: Up through the levels' channels; otherwise at once.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self, dims: tuple[int, ...], chans: int, stepwise: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if stepwise:
            self.steps = nn.Sequential(*[Step(dims[j], dims[j - 1], **dd) for j in (3, 2, 1)])
            self.out = nn.Sequential(nn.Conv2d(dims[0], chans * 16, 1, **dd), nn.PixelShuffle(4))
        else:
            self.steps = nn.Sequential()
            self.out = nn.Sequential(
                LayerNorm2d(dims[3], eps=1e-6, **dd), nn.Conv2d(dims[3], chans * 1024, 1, **dd), nn.PixelShuffle(32)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The image, in front of a sigmoid."""
        return self.out(self.steps(x))


class Supervision(nn.Module):
    """The classifiers and decoders of the columns ahead of the last; the last one's classifier is the network's own.

    Args:
        dims: Channels of the levels.
        columns: Number of columns.
        num_classes: Classes.
        in_chans: Channels of the image.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: The number of columns is no multiple of four.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        columns: int,
        num_classes: int,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if columns % PLACES or not columns:
            raise GraftError(f"revcol: inter_supv=True needs a multiple of {PLACES} columns, not {columns}")
        if num_classes < 1:
            raise GraftError(f"revcol: inter_supv=True needs classes, not num_classes={num_classes}")
        dd = {"device": device, "dtype": dtype}
        self.interval = columns // PLACES
        norm = partial(LayerNorm2d, eps=1e-6)
        self.heads = nn.ModuleList(
            NormMlpClassifierHead(dims[3], num_classes, norm_layer=norm, **dd) for _ in range(PLACES - 1)
        )
        stepwise = num_classes <= FEW_CLASSES
        self.decoders = nn.ModuleList(Decoder(dims, in_chans, stepwise, **dd) for _ in range(PLACES - 1))

    def place(self, column: int) -> int | None:
        """Which classifier and decoder read the column; None for those without, and for the last."""
        found, rest = divmod(column + 1, self.interval)
        return found - 1 if rest == 0 and found < PLACES else None

    def forward(self, c3: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The logits and the image of one place."""
        return self.heads[place](c3), self.decoders[place](c3)
