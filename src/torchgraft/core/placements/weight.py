"""WeightDelta: a change of a frozen weight, on any layer that reads it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import GraftError
from ...swap import original_class
from ..graft import Args, Kwargs, first_output, first_tensor, replace_output
from ..layers import ConvGeometry, is_conv, is_standardised
from .base import Hook, Placement, Support


class WeightDelta(Placement):
    """``W + form()`` wherever the layer, or anyone else, reads ``W``.

    The module's attribute (``weight``, ``in_proj_weight``, ...) returns the changed weight, so the layer's
    own forward does the rest: groups, dilation, every padding rule, and layers whose weight is read by
    their parent and which are never called themselves. A layer that standardises its weight in the forward
    is the exception: there the delta belongs on the *standardised* weight, so its contribution is computed
    as a second convolution beside it.

    Args:
        home: Path of the module.
        form: Module whose forward takes nothing and returns the delta, of the weight's shape (or of the
            shape of ``weight[rows]``).
        parameter: Name of the weight.
        rows: Slice of the first axis that the delta covers, such as q and v of a fused qkv; without a step.
        standardised: Act beside the layer; :meth:`on` sets this and what it needs.

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
        standardised: bool = False,
        slot: str | None = None,
    ) -> None:
        super().__init__(home, slot)
        if rows is not None and rows.step not in (None, 1):
            raise GraftError(f"delta at {home!r}: rows={rows} has a step; expected slice(start, stop)")
        self.form, self.parameter, self.rows = form, parameter, rows
        self.geometry: ConvGeometry | None = None
        self.groups, self.out_channels = 1, 0
        self.standardised = standardised

    @classmethod
    def on(cls, module: nn.Module, home: str, form: nn.Module, **options: Any) -> WeightDelta:
        """The placement for ``module``: beside it where the weight is standardised, else on the weight."""
        placement = cls(home, form, standardised=is_standardised(module), **options)
        if placement.standardised:
            placement.geometry = ConvGeometry.of(module)
            placement.groups = int(module.groups)  # type: ignore[arg-type]
            placement.out_channels = int(module.out_channels)  # type: ignore[arg-type]
        return placement

    def hooks(self) -> list[Hook]:
        """A view of the weight, or an action after a weight-standardised layer."""
        return [Hook(self.home, "after" if self.standardised else f"view:{self.parameter}", self)]

    def views(self) -> tuple[str, ...]:
        """The weight, unless the delta acts beside it."""
        return () if self.standardised else (self.parameter,)

    def view(self, name: str, value: Tensor) -> Tensor:
        """The weight with the delta added."""
        delta = self.form()
        if self.rows is None:
            return value + delta
        start, stop, _ = self.rows.indices(value.shape[0])
        return torch.cat([value[:start], value[start:stop] + delta, value[stop:]])

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """Add the delta's own convolution to the output of a weight-standardised layer."""
        assert self.geometry is not None
        delta = self.form()
        if self.rows is not None:
            start, stop, _ = self.rows.indices(self.out_channels)
            shape = delta.shape[1:]
            delta = torch.cat(
                [delta.new_zeros(start, *shape), delta, delta.new_zeros(self.out_channels - stop, *shape)]
            )
        y = self.geometry.apply(first_tensor(args, kwargs), delta, self.groups)
        return replace_output(out, first_output(out) + y)

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


def _computed(parameter: str, module: nn.Module) -> str:
    name = original_class(module).__name__
    if parametrize.is_parametrized(module, parameter):
        return f"the {parameter} of {name} is computed by a parametrisation; make it plain with remove_parametrizations"
    return f"{name} holds no parameter {parameter!r} (it has none, or computes it in every forward)"
