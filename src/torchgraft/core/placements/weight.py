"""WeightDelta: a change of a frozen weight, on any layer that reads it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import GraftError
from ...swap import original_class
from ..graft import Args, Kwargs, first_output, first_tensor, replace_output
from ..layers import CONVS, ConvGeometry, is_conv, is_standardised, out_channels
from .base import Hook, Placement, Support

_LINEAR = frozenset({nn.Linear.forward, TimmLinear.forward, Conv2dSame.forward, *(c.forward for c in CONVS.values())})
"""The forwards that do nothing to an input and a weight but multiply or convolve them, and add the bias."""


class WeightDelta(Placement):
    """``W + form()`` wherever the layer, or anyone else, reads ``W``.

    It acts in one of two ways:

    * As a *view*: the module's attribute (``weight``, ``in_proj_weight``, ...) returns the changed weight, so the
      layer's own forward does the rest: groups, dilation, every padding rule, and layers whose weight is read by
      their parent and which are never called themselves.
    * *Beside* the layer: what the delta makes of the input is added to the output, ``y[rows] += form.along(x)``.
      Nothing of the weight's size is made, forward or backward, and adapters of one batch share the layer's own
      product. This needs a form that defines ``along(x, geometry)`` and a layer that is called. The attribute
      then still returns the plain weight.

    A layer that standardises its weight in the forward always gets the second: there the delta belongs on the
    *standardised* weight. Forms without ``along`` act by a second convolution with ``form()``.

    Args:
        home: Path of the module.
        form: Module whose forward takes nothing and returns the delta, of the weight's shape (or of the
            shape of ``weight[rows]``). It may define ``along(x, geometry)``: what the delta makes of the layer's
            input x, without a bias; ``geometry`` is None for a linear layer. Or ``replace(weight)``: the new
            weight (its rows) in place of a sum, for changes that depend on the weight.
        parameter: Name of the weight.
        rows: Slice of the first axis that the delta covers, such as q and v of a fused qkv; without a step.
        beside: Act beside the layer; :meth:`on` sets this and what it needs.

    Raises:
        GraftError: ``rows`` has a step.
    """

    kind: ClassVar[str] = "delta"
    functional: ClassVar[bool] = True

    def __init__(
        self,
        home: str,
        form: nn.Module,
        *,
        parameter: str = "weight",
        rows: slice | None = None,
        beside: bool = False,
        slot: str | None = None,
    ) -> None:
        super().__init__(home, slot)
        if rows is not None and rows.step not in (None, 1):
            raise GraftError(f"delta at {home!r}: rows={rows} has a step; expected slice(start, stop)")
        self.form, self.parameter, self.rows = form, parameter, rows
        self.beside = beside
        self.geometry: ConvGeometry | None = None
        self.groups, self.out_channels = 1, 0

    @classmethod
    def on(cls, module: nn.Module, home: str, form: nn.Module, *, called: bool = False, **options: Any) -> WeightDelta:
        """The placement for ``module``: beside it where that is possible, else on the weight.

        Args:
            module: The layer.
            home: Its path.
            form: The delta.
            called: Whether the layer is known to be called in a forward (``Site.fires``), so that a form with
                ``along`` may act beside it.
            **options: As for the class.

        Raises:
            GraftError: The form replaces the weight, but the layer standardises it.
        """
        placement = cls(home, form, **options)
        if is_standardised(module) and hasattr(form, "replace"):
            raise GraftError(f"delta at {home!r}: the layer standardises its weight, so a form cannot replace it")
        placement.beside = is_standardised(module) or (called and placement._goes_along(module))
        if placement.beside and is_conv(module):
            placement.geometry = ConvGeometry.of(module)
            placement.groups = int(module.groups)  # type: ignore[arg-type]
        if placement.beside:
            placement.out_channels = out_channels(module) or 0
        return placement

    def _goes_along(self, module: nn.Module) -> bool:
        """Whether the form's ``along`` gives what this layer would compute with the delta."""
        conv = is_conv(module)
        if not hasattr(self.form, "along") or hasattr(self.form, "replace") or self.parameter != "weight":
            return False
        if conv and (module.groups != 1 or (module.transposed and self.rows is not None)):
            return False
        own: Any = original_class(module)
        return own.forward in _LINEAR

    def hooks(self) -> list[Hook]:
        """A view of the weight, or an action after the layer."""
        return [Hook(self.home, "after" if self.beside else f"view:{self.parameter}", self)]

    def views(self) -> tuple[str, ...]:
        """The weight, unless the delta acts beside it."""
        return () if self.beside else (self.parameter,)

    def view(self, name: str, value: Tensor) -> Tensor:
        """The changed weight."""
        if self.rows is None:
            return self._changed(value)
        start, stop, _ = self.rows.indices(value.shape[0])
        return torch.cat([value[:start], self._changed(value[start:stop]), value[stop:]])

    def _changed(self, value: Tensor) -> Tensor:
        if hasattr(self.form, "replace"):
            return self.form.replace(value)  # type: ignore[operator]
        return value + self.form()

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """Add to the layer's output what the delta makes of its input."""
        y, x = first_output(out), first_tensor(args, kwargs)
        if self.groups == 1 and hasattr(self.form, "along"):
            change = self.form.along(x, self.geometry)  # type: ignore[operator]
            if self.rows is not None:
                # Padded and added: in the backward this costs nothing, where joining slices would fill three tensors.
                start, stop, _ = self.rows.indices(self.out_channels)
                space = [0, 0] * (self.geometry.dims if self.geometry else 0)
                change = F.pad(change, [*space, start, self.out_channels - stop])
        else:
            assert self.geometry is not None
            delta = self.form()
            change = self.geometry.apply(in_type_of(x, delta), self._all_rows(delta), self.groups)
        return replace_output(out, y + change.to(y.dtype))

    def _all_rows(self, delta: Tensor) -> Tensor:
        """The delta with zeros in the rows that it does not cover: groups count all of them."""
        if self.rows is None:
            return delta
        start, stop, _ = self.rows.indices(self.out_channels)
        zeros = delta.new_zeros
        return torch.cat([zeros(start, *delta.shape[1:]), delta, zeros(self.out_channels - stop, *delta.shape[1:])])

    def folded(self, module: nn.Module) -> dict[str, Tensor]:
        """The new weight, computed in float32."""
        weight = module._parameters[self.parameter]
        return {self.parameter: self.view(self.parameter, weight.float())}  # type: ignore[union-attr]

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """Every layer with a weight; merging a delta on a standardised weight changes the layer's class."""
        name = original_class(module).__name__
        matrix = is_conv(module) or isinstance(module, (nn.Linear, nn.Embedding))
        if matrix and module._parameters.get("weight") is None:
            return Support(False, False, _computed("weight", module))
        if is_standardised(module):
            return Support(True, False, "the layer standardises its weight: the sum is no such weight")
        if matrix or isinstance(module, nn.MultiheadAttention):
            return Support(True, True)
        return Support(False, False, f"{name} has no weight matrix or kernel")

    def supports_here(self, module: nn.Module) -> Support:
        """As :meth:`supports`, and the module must hold the named parameter itself."""
        support = type(self).supports(module)
        if support.forward and module._parameters.get(self.parameter) is None:
            return Support(False, False, _computed(self.parameter, module))
        return support


def in_type_of(x: Tensor, parameter: Tensor) -> Tensor:
    """The input in a form's own precision: some models keep single layers in another. Autocast sees to it by itself."""
    if x.dtype == parameter.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(parameter.dtype)


def _computed(parameter: str, module: nn.Module) -> str:
    name = original_class(module).__name__
    if parametrize.is_parametrized(module, parameter):
        return f"the {parameter} of {name} is computed by a parametrisation; make it plain with remove_parametrizations"
    return f"{name} holds no parameter {parameter!r} (it has none, or computes it in every forward)"
