"""Folding: the placements at one module into its own parameters, in the order in which they act.

What acts at a module acts in a fixed order: views make of its parameters what its forward reads, ``before``
actions change its input, ``after`` actions its output. Folding follows that order: views first, then what acts
on the output, then what acts on the input, innermost first. A placement folds when nothing that stays stands
between it and the weights; the others keep acting, with the reason.

A layer that computes the weight it convolves with (weight standardisation) cannot hold a changed one: computing
would undo the change. Such a layer becomes a plain convolution that holds the computed weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..swap import original_class, swap, unswap
from .graft import GraftPoint
from .layers import CONVS, ConvGeometry, is_conv, is_standardised
from .placements import Placement

_CONVOLVES: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_PLAIN = {layer.forward for layer in (nn.Linear, *CONVS.values())}
"""Forwards that are known to use the weight as it is."""


class PlainConv:
    """Swapped into a convolution that computes its weight: it runs as a plain one on the weight it holds."""

    swap_rank = 9
    """Innermost: what adapters do at the layer, they do around this."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C_in, *space) -> (N, C_out, *space)."""
        if self.__dict__["_pads_same"]:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return self._conv_forward(x, self.weight, self.bias)


class CannotFoldError(Exception):
    """Why a module's placements do not fold after all."""


@dataclasses.dataclass
class Fold:
    """What was done to one module, and how to undo it.

    Attributes:
        module: The module.
        parameters: Name -> what it was before.
        plain: Whether it was made a plain convolution.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    plain: bool = False

    def created(self) -> list[str]:
        """Names of parameters that the module did not have."""
        return [name for name, old in self.parameters.items() if old is None]

    def undo(self) -> None:
        """Bring back the very parameters and the class; they follow a model that was moved or cast meanwhile."""
        for name, old in self.parameters.items():
            now = self.module._parameters.get(name)
            if old is not None and now is not None and (now.device, now.dtype) != (old.device, old.dtype):
                old.data = old.data.to(now.device, now.dtype)
            self.module._parameters[name] = old
        if self.plain:
            unswap(self.module, PlainConv)
            del self.module.__dict__["_pads_same"]


def folding_order(module: nn.Module, point: GraftPoint, name: str) -> tuple[list[Placement], dict[Placement, str]]:
    """The placements of adapter ``name`` that fold into ``module``, in folding order; why the others do not."""
    actions = point.actions.get(name, [])
    stays: dict[Placement, str] = {}
    for action in dict.fromkeys(action for _, action in actions):
        reason = _obstacle(action, module) if action is _placement(action) else "it acts at several modules"
        if reason:
            stays.setdefault(_placement(action), reason)
    views = _unblocked_views(actions, stays)
    around = next((_placement(a) for when, a in actions if when == "around"), None)
    held = around or next((p for w, a in actions if w.startswith("view:") and (p := _placement(a)) in stays), None)
    blocked = f"{held.kind}, which stays, stands between it and the weight" if held is not None else ""
    outputs = _until_blocked([a for when, a in actions if when == "after"], stays, blocked)
    reader = next((a for w, a in actions if w == "after" and _placement(a) in stays and _reads_input(a)), None)
    if reader is not None and not blocked:
        blocked = f"{_placement(reader).kind}, which stays, reads the layer's input too"
    inputs = _until_blocked([a for when, a in reversed(actions) if when == "before"], stays, blocked)
    return [*views, *outputs, *inputs], stays


def fold(module: nn.Module, placements: list[Placement], like: torch.dtype) -> Fold:
    """Give ``module`` parameters that do what ``placements`` do, in this order; computed in float32.

    No adapter may be active meanwhile.

    Args:
        module: The module.
        placements: What folds, from :func:`folding_order`.
        like: The dtype for a parameter of a module that had none.

    Raises:
        CannotFoldError: The module computes its weight in a way that a plain layer does not reproduce; it is
            unchanged then.
    """
    before = dict(module._parameters)
    changed: dict[str, None] = {}
    computed: _Computed | None = None
    try:
        for name, parameter in before.items():
            if parameter is not None and parameter.is_floating_point():
                exact = torch.promote_types(parameter.dtype, torch.float32)
                module._parameters[name] = nn.Parameter(parameter.detach().to(exact), requires_grad=False)
        for placement in placements:
            if not _acts_on_parameters(placement) and computed is None:
                computed = _computed_weight(module)
                if computed is not None:
                    module._parameters["weight"] = nn.Parameter(computed.weight, requires_grad=False)
                    changed["weight"] = None
            for name, value in placement.folded(module).items():  # type: ignore[operator]
                module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
                changed[name] = None
        folded = {name: module._parameters[name] for name in changed}
    finally:
        module._parameters.clear()
        module._parameters.update(before)
    dtype = next((p.dtype for p in before.values() if p is not None and p.is_floating_point()), like)
    done = Fold(module, {name: before.get(name) for name in changed})
    for name, value in folded.items():
        assert value is not None
        module._parameters[name] = nn.Parameter(_cast(value.data, before.get(name), dtype), requires_grad=False)
    if computed is not None:
        module.__dict__["_pads_same"] = computed.pads_same
        swap(module, PlainConv)
        done.plain = True
    return done


# -- what folds ------------------------------------------------------------------------------------------


def _placement(action: Any) -> Placement:
    """The placement that an action belongs to: itself, or the one whose second half it is."""
    if isinstance(action, Placement):
        return action
    return next(value for value in vars(action).values() if isinstance(value, Placement))


def _obstacle(placement: Placement, module: nn.Module) -> str:
    """Why a placement does not fold into this module, whatever else acts there; empty: it does."""
    if not hasattr(placement, "folded"):
        support = placement.supports_here(module)
        return support.reason or "it has no folded form"
    for name in {"weight", "bias", *placement.views()} & module._parameters.keys():
        parameter = module._parameters[name]
        if parameter is None:
            continue
        if not parameter.is_floating_point():
            return f"{name} is quantised ({str(parameter.dtype).removeprefix('torch.')})"
        if type(parameter.data) is not Tensor:
            return f"{name} is a {type(parameter.data).__name__}, not a plain tensor (quantised or sharded)"
    support = placement.supports_here(module)
    if support.merge:
        return ""
    if is_standardised(module) and placement.supports_here(_plain_twin(module)).merge:
        return ""
    return support.reason or "it has no folded form"


def _plain_twin(conv: nn.Module) -> nn.Module:
    """What a convolution would be without the computation of its weight."""
    with torch.device("meta"):
        return ConvGeometry.of(conv).build(
            int(conv.in_channels),  # type: ignore[arg-type]
            int(conv.out_channels),  # type: ignore[arg-type]
            groups=int(conv.groups),  # type: ignore[arg-type]
        )


def _unblocked_views(actions: list[tuple[str, Any]], stays: dict[Placement, str]) -> list[Placement]:
    """The placements that act through parameters and come before any that stays on the same parameter."""
    blocked: dict[str, Placement] = {}
    folding: dict[Placement, None] = {}
    for when, action in actions:
        if not when.startswith("view:"):
            continue
        placement, name = _placement(action), when[5:]
        ahead = next((blocked[n] for n in placement.views() if n in blocked), None)
        if placement not in stays and ahead is not None:
            stays[placement] = f"it acts on what {ahead.kind}, which stays, makes of {name}"
        if placement in stays:
            blocked |= dict.fromkeys(placement.views(), placement)
        else:
            folding[placement] = None
    return list(folding)


def _until_blocked(actions: list[Any], stays: dict[Placement, str], blocked: str) -> list[Placement]:
    """The placements, from the weights outwards, up to the first that stays."""
    folding = []
    for action in actions:
        placement = _placement(action)
        if placement in stays or action is not placement:
            blocked = blocked or f"{placement.kind}, which stays, stands between it and the weight"
        elif blocked:
            stays[placement] = blocked
        else:
            folding.append(placement)
    return folding


def _reads_input(action: Any) -> bool:
    """Whether an action on the output also reads the layer's input (all but those known not to)."""
    return _placement(action).kind not in ("affine", "sequential", "stream")


def _acts_on_parameters(placement: Placement) -> bool:
    return all(hook.when.startswith("view:") for hook in placement.hooks())


# -- layers that compute their weight ----------------------------------------------------------------------


@dataclasses.dataclass
class _Computed:
    """The weight that a layer's own forward makes, and whether it pads its input by the SAME rule."""

    weight: Tensor
    pads_same: bool


def _computed_weight(module: nn.Module) -> _Computed | None:
    """What a convolution or linear layer hands to the operator in place of its parameter; None: the parameter.

    The layer is run on a small input, and the operator's arguments are looked at, so it need not be known how
    the weight is made.

    Raises:
        CannotFoldError: The layer does something else than one convolution with a weight.
    """
    own: Any = original_class(module)
    name = own.__name__
    if not (is_conv(module) or isinstance(module, nn.Linear)) or own.forward in _PLAIN:
        return None
    weight = module._parameters["weight"]
    assert weight is not None
    shape, seen, generator = _small_input(module), _Operands(), torch.Generator().manual_seed(0)
    shapes = [[n + more if i > 1 else n for i, n in enumerate(shape)] for more in (0, 1, 2)]
    inputs = [torch.randn(s, generator=generator).to(weight.device) for s in shapes]
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        with seen:
            outputs = [own.forward(module, x) for x in inputs]
        if len(seen.calls) != len(inputs):
            raise CannotFoldError(f"{name} is no single convolution with a weight")
        if all(used is weight for _, used in seen.calls):
            return None
        if isinstance(module, nn.Linear) or not hasattr(module, "_conv_forward"):
            raise CannotFoldError(f"{name} computes its weight in every forward")
        computed = seen.calls[0][1].detach()
        same = any(given.shape != x.shape for x, (given, _) in zip(inputs, seen.calls, strict=True))
        for x, wanted in zip(inputs, outputs, strict=True):
            padded = pad_same(x, module.kernel_size, module.stride, module.dilation) if same else x  # type: ignore[arg-type]
            found = module._conv_forward(padded, computed, module._parameters.get("bias"))  # type: ignore[operator]
            if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
                raise CannotFoldError(f"{name} does more than a convolution with the weight it computes")
    return _Computed(computed, same)


def _small_input(module: nn.Module) -> tuple[int, ...]:
    """Shape of the smallest input that every output position of the layer can be computed from."""
    if isinstance(module, nn.Linear):
        return 1, module.in_features
    geometry = ConvGeometry.of(module)
    given = (0,) * geometry.dims if isinstance(geometry.padding, str) else geometry.padding
    size = [d * (k - 1) + 1 + 2 * p for d, k, p in zip(geometry.dilation, geometry.kernel, given, strict=True)]
    return 1, int(module.in_channels), *size  # type: ignore[arg-type]


class _Operands(TorchFunctionMode):
    """Notes the input and the weight of every convolution and matrix product inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLVES:
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self.calls.append((given["input"], given["weight"]))
        return func(*args, **kwargs)


def _cast(value: Tensor, old: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The value in the dtype and memory layout of the parameter it replaces."""
    if old is None or old.shape != value.shape:
        return value.to(dtype)
    return torch.empty_like(old).copy_(value)
