"""Affine: scale and shift the channels of what a layer returns, or of what it reads."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ...errors import GraftError
from ...lean.hooks import traces_eagerly
from ...lean.saved import derive
from ...swap import original_class
from ..graft import Args, Kwargs, first_output, first_tensor, replace_first, replace_output
from ..layers import ConvGeometry, channel_axis, in_channels, is_conv, is_norm, is_standardised, out_channels
from .base import Hook, Placement, Side, Support

_TAKES_AN_AFFINE = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm)
"""Norms whose forward uses a weight and a bias when there are some, and does without when there are none."""


class Affine(Placement):
    """``y = scale * y + shift`` per channel of the module's output, or of its input.

    With ``through`` the pair acts on the layer's parameters, wherever they are read, instead of on its call:
    ``scale * W`` and ``scale * b + shift``. That is the same for a layer that is called, the only way for one
    whose parent reads its weights (``nn.MultiheadAttention``), and the place between norm and activation of a
    layer that does both. Such a pair acts on what the views listed before it make of the parameters.

    Args:
        home: Path of the module.
        scale: Parameter of shape (C,), or None for a shift only.
        shift: Parameter of shape (C,), or None for a scale only.
        axis: Axis that holds the channels: 1 for maps, -1 for tokens.
        side: Whether the module's output or its input is changed.
        rows: Slice of the channels that the C values are for, such as k and v of a fused qkv; the others stay
            as they are. Without a step; default: all.
        through: Names of the weight and of the bias to act through; None in place of a name: not that one.

    Raises:
        GraftError: ``rows`` has a step, or the input is to be shifted ``through`` the parameters.
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
        side: Side = "output",
        rows: slice | None = None,
        through: tuple[str | None, str | None] | None = None,
        slot: str | None = None,
    ) -> None:
        super().__init__(home, slot)
        if rows is not None and rows.step not in (None, 1):
            raise GraftError(f"affine at {home!r}: rows={rows} has a step; expected slice(start, stop)")
        if through is not None and side == "input" and shift is not None:
            raise GraftError(f"affine at {home!r}: an input is shifted where the layer is called; drop through=")
        self.register_parameter("scale", scale)
        self.register_parameter("shift", shift)
        self.axis, self.side, self.rows, self.through = axis, side, rows, through
        self.functional = through is not None  # type: ignore[misc]

    # -- acting -----------------------------------------------------------------------------------------

    def hooks(self) -> list[Hook]:
        """An action before or after the module, or a view of each parameter."""
        if self.through is not None:
            return [Hook(self.home, f"view:{name}", self) for name in self.views()]
        return [Hook(self.home, "before" if self.side == "input" else "after", self)]

    def views(self) -> tuple[str, ...]:
        """The parameters it acts through."""
        return tuple(name for name in self.through or () if name is not None)

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Scale and shift the input."""
        return replace_first(args, kwargs, self._changed(first_tensor(args, kwargs)))

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """Scale and shift the output."""
        return replace_output(out, self._changed(first_output(out)))

    def view(self, name: str, value: Tensor | None) -> Tensor:
        """The weight or the bias under the pair, in its type; a bias that is not there counts as zero."""
        assert self.through is not None
        if name == self.through[0]:
            assert value is not None
            axis = 0 if self.side == "output" else 1
            if self.scale is None:
                return value
            return _along(value, self._all(self.scale, value.shape[axis], 1.0), axis).to(value.dtype)
        if value is None:
            assert self.shift is not None
            return self._all(self.shift, 0, 0.0)
        changed = value if self.scale is None else value * self._all(self.scale, value.shape[0], 1.0)
        shifted = changed if self.shift is None else changed + self._all(self.shift, value.shape[0], 0.0)
        return shifted.to(value.dtype)

    def _changed(self, y: Tensor) -> Tensor:
        """Scaled and shifted, in the type of ``y``: under autocast the values are more precise than what they meet."""
        shape = [-1] + [1] * (y.dim() - 2) if self.axis == 1 else [-1]
        width = y.shape[self.axis]
        scale = None if self.scale is None else self._all(self.scale, width, 1.0).view(shape)
        shift = None if self.shift is None else self._all(self.shift, width, 0.0).view(shape)
        out = _scaled_and_shifted(y, scale, shift)
        if scale is not None and scale.requires_grad and traces_eagerly():
            # The product keeps y for the gradient of the scale, so its result need not be kept by what reads it.
            values = tuple(p for p in (self.scale, self.shift) if p is not None)
            derive(out, functools.partial(_scaled_and_shifted, scale=scale, shift=shift), y, values)
        return out

    def _all(self, values: Tensor, width: int, neutral: float) -> Tensor:
        """One value per channel, where ``rows`` covers only some of them."""
        if self.rows is None:
            return values
        start, stop, _ = self.rows.indices(width)
        return F.pad(values, (start, width - stop), value=neutral)

    # -- folding ----------------------------------------------------------------------------------------

    def folded(self, module: nn.Module) -> dict[str, Tensor]:
        """New parameters of ``module`` that do the same, by name; computed in float32 at least."""
        held = {name: None if p is None else _precise(p) for name, p in module._parameters.items()}
        if self.through is not None:
            return {name: self.view(name, held[name]) for name in self.views()}
        weight, bias = held["weight"], held.get("bias")
        width = self._width(module)
        scale = None if self.scale is None else self._all(_precise(self.scale), width, 1.0)
        shift = None if self.shift is None else self._all(_precise(self.shift), width, 0.0)
        new: dict[str, Tensor] = {}
        if self.side == "input":
            assert weight is not None
            if shift is not None:
                new["bias"] = _response(module, weight, shift) + (0.0 if bias is None else bias)
            if scale is not None:
                new["weight"] = _scaled_columns(module, weight, scale)
            return new
        if scale is not None:
            new["weight"] = scale if weight is None else _scaled_rows(module, weight, scale)
        if bias is not None or shift is not None:
            scaled = bias if bias is None or scale is None else bias * scale
            new["bias"] = torch.stack([t for t in (scaled, shift) if t is not None]).sum(0)
        return new

    def _width(self, module: nn.Module) -> int:
        known = in_channels(module) if self.side == "input" else out_channels(module)
        own = next(p.numel() for p in (self.scale, self.shift) if p is not None)
        return known or own

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """Any module whose output has a channel axis; folds where the layer has a weight per channel."""
        if is_standardised(module):
            return Support(True, False, "the layer standardises its weight, which undoes a scale")
        if _activates(module):
            return Support(True, False, "the activation inside the layer stands between its weight and its output")
        return _foldable(module, scale=True, shift=True)

    def supports_here(self, module: nn.Module) -> Support:
        """As :meth:`supports`, for this pair: one without a shift needs no bias, one on the input other sums."""
        if self.through is not None:
            missing = next((n for n in self.views() if n not in {**module._parameters, **module._buffers}), None)
            if missing is not None or (self.through[0] and module._parameters.get(self.through[0]) is None):
                name = original_class(module).__name__
                return Support(False, False, f"{name} holds no parameter {missing or self.through[0]!r}")
            computed = any(n not in module._parameters for n in self.views())
            return Support(True, not computed, "it acts through a buffer" if computed else "")
        if self.side == "input":
            return _foldable_input(module, shift=self.shift is not None)
        support = type(self).supports(module)
        if not support.merge and self.shift is None and _has_known_axis(module) and "bias" not in module._parameters:
            return _foldable(module, scale=True, shift=False)
        return support


def affine_for(
    module: nn.Module,
    path: str,
    *,
    scale: bool = True,
    shift: bool = True,
    side: Side = "output",
    rows: slice | None = None,
    before_act: bool = False,
    slot: str | None = None,
) -> Affine:
    """An identity :class:`Affine` of the right width and axis for ``module``, a single layer.

    Args:
        module: The layer.
        path: Its path.
        scale: Whether it scales.
        shift: Whether it shifts.
        side: Whether the output or the input is changed.
        rows: Only these channels.
        before_act: Where a norm has an activation inside, act between the two, through the norm's parameters.
        slot: Name of the placement at its home.

    Raises:
        GraftError: The layer has no fixed number of channels, or it is not known on which axis they are.
    """
    width = out_channels(module) if side == "output" else in_channels(module)
    over_several = is_norm(module) and any(w is not None and w.dim() > 1 for w in module._parameters.values())
    if width is None or over_several:
        raise GraftError(
            f"affine: {path!r} ({original_class(module).__name__}) has no fixed number of {side} channels; "
            "name a linear layer, a convolution or a norm over one axis"
        )
    if not _has_known_axis(module):
        raise GraftError(
            f"affine: {path!r} ({original_class(module).__name__}) is no single layer of a known kind, so the axis of "
            "its channels is not known; name a layer inside it, or give Affine(..., axis=)"
        )
    if rows is not None:
        width = len(range(*rows.indices(width)))
    return Affine(
        path,
        nn.Parameter(torch.ones(width)) if scale else None,
        nn.Parameter(torch.zeros(width)) if shift else None,
        axis=channel_axis(module),
        side=side,
        rows=rows,
        through=("weight", "bias") if before_act and _activates(module) else None,
        slot=slot,
    )


def _scaled_and_shifted(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None and shift is not None:
        return torch.addcmul(shift, y, scale).to(y.dtype)  # one pass over y, where two operators make two
    changed = y if scale is None else y * scale
    return (changed if shift is None else changed + shift).to(y.dtype)


def _activates(module: nn.Module) -> bool:
    """Whether a norm applies an activation too (timm's ``BatchNormAct2d``, the norms of BiT in transformers)."""
    inside = (getattr(module, name, None) for name in ("act", "activation"))
    return is_norm(module) and any(isinstance(m, nn.Module) and not isinstance(m, nn.Identity) for m in inside)


def _has_known_axis(module: nn.Module) -> bool:
    """Whether ``module`` is one layer whose weight and output have their channels on a known axis."""
    return is_conv(module) or is_norm(module) or isinstance(module, nn.Linear)


def _foldable(module: nn.Module, *, scale: bool, shift: bool) -> Support:
    """Whether the output's pair folds into the layer's weight and bias."""
    name = original_class(module).__name__
    if not _has_known_axis(module):
        return Support(True, False, f"{name} has no weight per output channel")
    if isinstance(module, _TAKES_AN_AFFINE) and {"weight", "bias"} <= module._parameters.keys():
        return Support(True, True)
    if scale and module._parameters.get("weight") is None:
        return Support(True, False, f"{name} holds no weight that could take the scale")
    if shift and "bias" not in module._parameters:
        return Support(True, False, f"{name} has no place for a bias that could take the shift")
    return Support(True, True)


def _foldable_input(module: nn.Module, *, shift: bool) -> Support:
    """Whether the input's pair folds into the columns of the layer's weight, and into its bias."""
    name = original_class(module).__name__
    if is_norm(module):
        return Support(True, False, f"{name} normalises away what its input is scaled by")
    if not (is_conv(module) or isinstance(module, nn.Linear)) or module._parameters.get("weight") is None:
        return Support(True, False, f"{name} has no weight per input channel")
    if is_standardised(module):
        return Support(True, False, "the layer standardises its weight: the product is no such weight")
    if shift and "bias" not in module._parameters:
        return Support(True, False, f"{name} has no place for a bias that could take the shift")
    if shift and is_conv(module) and _pads_with_zeros(module):
        return Support(True, False, "zeros are padded behind the shift, so it is no constant at the border")
    return Support(True, True)


def _pads_with_zeros(conv: nn.Module) -> bool:
    """Whether outputs at the border of a convolution see zeros, or fewer values, where others see its input."""
    geometry = ConvGeometry.of(conv)
    if geometry.transposed or geometry.padding_mode != "zeros":
        return geometry.transposed
    if geometry.same or isinstance(geometry.padding, str):
        return max(geometry.kernel) > 1 and geometry.padding != "valid"
    return max(geometry.padding) > 0


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _along(weight: Tensor, values: Tensor, axis: int) -> Tensor:
    return weight * values.view(*[-1 if d == axis else 1 for d in range(weight.dim())])


def _scaled_rows(module: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """``scale`` on the output channels of a weight."""
    if not (is_conv(module) and getattr(module, "transposed", False)):
        return _along(weight, scale, 0)
    groups = int(module.groups)  # type: ignore[arg-type]  # (C_in, C_out / groups, *kernel), group by group
    grouped = weight.view(groups, -1, *weight.shape[1:])
    return (grouped * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def _scaled_columns(module: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """``scale`` on the input channels of a weight."""
    if is_conv(module) and getattr(module, "transposed", False):
        return _along(weight, scale, 0)
    groups = int(getattr(module, "groups", 1))
    grouped = weight.view(groups, -1, *weight.shape[1:])  # (groups, C_out / groups, C_in / groups, *kernel)
    return (grouped * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def _response(module: nn.Module, weight: Tensor, shift: Tensor) -> Tensor:
    """What the layer, without its bias, answers to the constant input ``shift``: one value per output channel."""
    return _scaled_columns(module, weight, shift).flatten(1).sum(1)
