"""Affine: scale and shift the channels of a layer's output."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import GraftError
from ...swap import original_class
from ..graft import Args, Kwargs, first_output, replace_output
from ..layers import channel_axis, is_conv, is_norm, is_standardised, out_channels
from .base import Hook, Placement, Support


class Affine(Placement):
    """``y = scale * y + shift`` per channel of the module's output.

    Args:
        home: Path of the module.
        scale: Parameter of shape (C,), or None for a shift only.
        shift: Parameter of shape (C,), or None for a scale only.
        axis: Axis of the output that holds the channels: 1 for maps, -1 for tokens.
    """

    kind: ClassVar[str] = "affine"
    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(
        self,
        home: str,
        scale: nn.Parameter | None,
        shift: nn.Parameter | None,
        *,
        axis: int,
        slot: str | None = None,
    ) -> None:
        super().__init__(home, slot)
        self.register_parameter("scale", scale)
        self.register_parameter("shift", shift)
        self.axis = axis

    def hooks(self) -> list[Hook]:
        """One action after the module."""
        return [Hook(self.home, "after", self)]

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """Scale and shift the output."""
        y = first_output(out)
        shape = [-1] + [1] * (y.dim() - 2) if self.axis == 1 else [-1]
        if self.scale is not None:
            y = y * self.scale.view(shape)
        if self.shift is not None:
            y = y + self.shift.view(shape)
        return replace_output(out, y)

    def folded(self, module: nn.Module) -> dict[str, Tensor]:
        """New weight and bias of ``module`` that do the same; computed in float32."""
        held = module._parameters["weight"]
        assert held is not None
        weight = held.float()
        scale = weight.new_ones(out_channels(module) or 1) if self.scale is None else self.scale.float()
        shift = weight.new_zeros(scale.shape) if self.shift is None else self.shift.float()
        old = module._parameters.get("bias")
        bias = weight.new_zeros(scale.shape) if old is None else old.float()
        if is_conv(module) and getattr(module, "transposed", False):
            groups = int(module.groups)  # type: ignore[arg-type]
            grouped = weight.view(groups, -1, *weight.shape[1:])
            factor = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            new = (grouped * factor).view_as(weight)
        else:
            new = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        return {"weight": new, "bias": bias * scale + shift}

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """Any module whose output has a channel axis; folds where the layer has a weight per channel."""
        name = original_class(module).__name__
        if is_standardised(module):
            return Support(True, False, "the layer standardises its weight, which undoes a scale")
        if is_norm(module) and hasattr(module, "act") and not isinstance(module.act, nn.Identity):
            return Support(True, False, "the activation inside the layer stands between its weight and its output")
        if not _has_known_axis(module):
            return Support(True, False, f"{name} has no weight per output channel")
        if module._parameters.get("weight") is None:
            return Support(True, False, f"{name} holds no weight that could take the scale")
        if "bias" not in module._parameters:
            return Support(True, False, f"{name} has no place for a bias that could take the shift")
        return Support(True, True)


def affine_for(module: nn.Module, path: str, *, scale: bool = True, shift: bool = True) -> Affine:
    """An identity :class:`Affine` of the right width and axis for ``module``, a single layer.

    Raises:
        GraftError: The layer has no fixed number of channels, or it is not known on which axis they are.
    """
    width = out_channels(module)
    over_several = is_norm(module) and any(w is not None and w.dim() > 1 for w in module._parameters.values())
    if width is None or over_several:
        raise GraftError(
            f"affine: {path!r} ({original_class(module).__name__}) has no fixed number of output channels; "
            "name a linear layer, a convolution or a norm over one axis"
        )
    if not _has_known_axis(module):
        raise GraftError(
            f"affine: {path!r} ({original_class(module).__name__}) is no single layer of a known kind, so the axis of "
            "its channels is not known; name a layer inside it, or give Affine(..., axis=)"
        )
    return Affine(
        path,
        nn.Parameter(torch.ones(width)) if scale else None,
        nn.Parameter(torch.zeros(width)) if shift else None,
        axis=channel_axis(module),
    )


def _has_known_axis(module: nn.Module) -> bool:
    """Whether ``module`` is one layer whose weight and output have their channels on a known axis."""
    return is_conv(module) or is_norm(module) or isinstance(module, nn.Linear)
