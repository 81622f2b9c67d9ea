"""VPT's prompts on the image (Jia et al., ECCV 2022): pixels around it, or channels below it. arXiv 2203.12119.

    pad     x' = cat_h(T, cat_w(L, x, R), B)    the image grows to S + 2 P; T, B: (3, P, S + 2 P); L, R: (3, S, P)
    below   y = C'(cat(x, T))                   T: (P, S, S); C': the first convolution, with 3 + P input channels

The frame and the channels are raw pixels that ImageNet's statistics normalise (``start="random"``; below: by their mean
over the channels) or values used as they are. C' and the BatchNorm behind it are the adapter's own, trained copies; the
first three channels start as the pretrained kernel's. Pad suits models that take images of any size; unlike
``pad-prompt``, which adds a frame inside the image. Both are tied to the size S of the image.

Parameters: pad 12 P (S + P) for three channels: S = 224: P = 5 13,740, P = 30 91,440. Below: P S S and those of C' and
the BatchNorm: ResNet-50, P = 5: 276,096. Not mergeable: the image itself is larger, or another. Start: U(0, 1), so not
the pretrained network; the new channels of C' Xavier-uniform, or like a patch embedding's prompts U(-v, v).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.blocks import class_name
from ..core.layers import is_batchnorm, is_conv
from ..core.method import Method, register
from ..core.placements import Input, Placement, Support, Train
from ..errors import GraftError
from .forms.image import EnlargingFrame, PromptChannels, image_reader, image_readers
from .forms.prompts import prompt_bound
from .forms.rehearsal import rehearse


@register("vpt-pad")
@dataclasses.dataclass(frozen=True)
class VPTPad(Method):
    """Config of padded prompts.

    Attributes:
        prompt_size: Width P of the frame in pixels.
        image_size: Side S of the image in pixels; null: that of the model's own input.
        start: ``"random"``: raw pixels U(0, 1); ``"gaussian"``: N(0, 1), not normalised.
    """

    prompt_size: int = 5
    image_size: int | None = None
    start: Literal["random", "gaussian"] = "random"

    def __post_init__(self) -> None:
        _check(self, self.prompt_size, "prompt_size")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One frame in front of the layer that reads the image, or of the module around it that knows its size."""
        _, shape = image_reader(anatomy, self.name)
        height, width = _size(self, shape)
        border = _Border(self.prompt_size)
        # The model itself must take such images: a patch embedding alone would cut off what does not fill a patch.
        wrong = rehearse(anatomy, Input(border, ""))
        if wrong is None:
            for path in image_readers(anatomy, self.name):
                wrong = rehearse(anatomy, Input(border, path))
                if wrong is None:
                    frame = EnlargingFrame(self.prompt_size, shape[1], height, width, start=self.start, name=self.name)
                    return [Input(frame, path, resizes=True)]
        side = 2 * self.prompt_size
        raise GraftError(
            f"{self.name}: {class_name(anatomy.model)} takes no image of {shape[2] + side} x {shape[3] + side} pixels, "
            f"to which the frame enlarges it ({wrong}); create it for images of any size (timm: "
            "dynamic_img_size=True), or use pad-prompt"
        )


@register("vpt-below")
@dataclasses.dataclass(frozen=True)
class VPTBelow(Method):
    """Config of prompt channels.

    Attributes:
        num_channels: Number P of further input channels.
        image_size: Side S of the image in pixels; null: that of the model's own input.
        start: ``"random"``: raw pixels U(0, 1), normalised; ``"gaussian"``: N(0, 1); ``"uniform"``: U(-v, v) as of
            prompts beside patches; ``"auto"``: uniform where patches are embedded, else random.
    """

    num_channels: int = 5
    image_size: int | None = None
    start: Literal["auto", "random", "gaussian", "uniform"] = "auto"

    def __post_init__(self) -> None:
        _check(self, self.num_channels, "num_channels")

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """The first convolution with more inputs, and a copy of the BatchNorm behind it."""
        reader, shape = image_reader(anatomy, self.name)
        height, width = _size(self, shape)
        conv: Any = anatomy.module(reader)
        if not is_conv(conv) or conv.groups != 1 or conv._parameters.get("weight") is None:
            raise GraftError(
                f"{self.name}: {reader!r} ({class_name(conv)}), which reads the image, is no plain convolution that "
                "could get more input channels; use vpt-pad or pad-prompt"
            )
        patches = conv.kernel_size == conv.stride and conv.stride[0] > 1
        uniform = self.start == "uniform" or (self.start == "auto" and patches)
        bound = prompt_bound(conv.kernel_size, conv.out_channels) if uniform else None
        start: str | float = bound if bound is not None else ("random" if self.start == "auto" else self.start)
        channels = PromptChannels(self.num_channels, height, width, start=start, name=self.name)
        own = _parameters(conv)
        # Read in place of the layer's own kernel, it is all that the layer's forward needs to take more channels.
        wider = WiderKernel(reader, {**own, "weight": widened(own["weight"], self.num_channels, bound)})
        return [Input(channels, reader), wider, *self._norm(anatomy, reader)]

    @staticmethod
    def _norm(anatomy: Anatomy, reader: str) -> list[Placement]:
        """A trained copy of the BatchNorm that runs right behind the convolution."""
        assert anatomy.trace is not None
        calls = anatomy.trace.calls
        order = sorted((p for p in calls if p), key=lambda p: calls[p].order)
        behind = [p for p in order[order.index(reader) + 1 :] if not reader.startswith(f"{p}.")][:1]
        path = behind[0] if behind and is_batchnorm(anatomy.module(behind[0])) else None
        if path is None:
            return []
        own = _parameters(anatomy.module(path))
        return [Train(path, own)] if own else []


class WiderKernel(Train):
    """The kernel over more channels than the image has, which the image is given in front of it."""

    def supports_here(self, module: nn.Module) -> Support:
        """As a trained copy, but for merging."""
        support = super().supports_here(module)
        return Support(support.forward, False, support.reason or "the kernel reads prompt channels beside the image")


def widened(weight: Tensor, more: int, bound: float | None) -> Tensor:
    """A kernel with ``more`` further input channels behind its own, which stay as they are.

    The new ones are drawn from U(-bound, bound), or as of a Xavier-uniform kernel where that is None.
    """
    shape = weight.shape[0], weight.shape[1] + more, *weight.shape[2:]
    fresh = torch.empty(shape, device=weight.device)
    fresh = nn.init.xavier_uniform_(fresh) if bound is None else fresh.uniform_(-bound, bound)
    return torch.cat([weight.detach(), fresh[:, weight.shape[1] :].to(weight.dtype)], 1)


class _Border(nn.Module):
    """Zeros around the image, to rehearse with."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.pad(image, (self.size,) * 4)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module._parameters.items() if p is not None}


def _size(config: VPTPad | VPTBelow, shape: tuple[int, ...]) -> tuple[int, int]:
    return (config.image_size, config.image_size) if config.image_size is not None else (shape[2], shape[3])


def _check(config: VPTPad | VPTBelow, count: int, option: str) -> None:
    if count < 1:
        raise GraftError(f"{config.name}: {option}={count} is not valid; expected at least 1")
    if config.image_size is not None and config.image_size < 1:
        raise GraftError(f"{config.name}: image_size={config.image_size} is not valid; expected a side in pixels")
