"""Putting lean layers into a model and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import GraftError, nearest
from ..swap import anatomy_of, original_class, swap, unswap
from . import layers as lean
from .compact import CompactInput, CompactSmooth
from .hooks import Watched
from .kinds import computes_by_itself, is_smooth, lean_layer
from .recompute import Recomputed

LEVELS = ("exact", "recompute", "checkpoint", "compact")
"""What may be kept for the backward, by what it promises: see :func:`level_of`."""


def level_of(given: bool | str) -> str | None:
    """The name of a level, None for none.

    * ``exact``: every gradient bit-identical to that without lean layers; no matrix product is computed twice.
    * ``recompute``: bit-identical; the MLPs of transformer blocks and their norms are computed twice, and expanding
      convolutions whose output something trained reads.
    * ``checkpoint``: bit-identical; whole blocks are computed twice.
    * ``compact``: derivatives of smooth activations in 8 bits; gradients differ by less than one per cent.

    Args:
        given: A level's name, True for ``exact``, False for none.

    Raises:
        GraftError: An unknown level.
    """
    if given is True:
        return "exact"
    if given is False or given == "off":
        return None
    if given not in LEVELS:
        raise GraftError(f"lean={given!r}: {nearest(str(given), LEVELS)}; or True (exact) or False")
    return str(given)


def make_lean(
    model: nn.Module,
    own: Iterable[nn.Module],
    adapted: Iterable[nn.Module],
    *,
    again: Iterable[nn.Module] = (),
    products: bool = False,
    compact: bool = False,
) -> None:
    """Swap lean layers in; what is there already stays.

    Args:
        model: The model.
        own: The backbone's own modules; the layers among them that have a lean form get it.
        adapted: Modules at which something trainable stands.
        again: Modules that run twice in place of being remembered.
        products: Whether what an expanding convolution returned may be computed again from its smaller input.
        compact: Whether smooth activations and the inputs of trained layers are kept in 8 bits.
    """
    inner = list(own)
    ours = {id(m) for m in inner}
    beside = _beside(model, adapted)
    for module in model.modules():
        layer = lean_layer(module)
        if compact and is_smooth(module) and id(module) not in beside:
            layer = CompactSmooth
        elif id(module) not in ours and layer not in _IN_ADAPTERS:
            layer = CompactInput if compact and layer in (lean.LeanConv, lean.LeanLinear) else None
        if layer is None:
            continue
        swap(module, layer)
        if products and issubclass(layer, lean.LeanConv):
            module.__dict__["_lean_again"] = True
        module.__dict__["_lean_plain"] = _own_forward(module) in PLAIN_FORWARDS
    for module in inner:
        if computes_by_itself(module):
            swap(module, Watched)
    for module in again:
        swap(module, Recomputed)


def _beside(model: nn.Module, adapted: Iterable[nn.Module]) -> set[int]:
    """Identities of modules beside which something trainable stands: it may keep their output, which follows from
    their input but not from a derivative."""
    places = {id(m) for m in adapted}
    found: set[int] = set()
    for parent in model.modules():
        children = [id(c) for c in parent.children()]
        if any(c in places for c in children):
            found.update(children)
    return found


def make_plain(model: nn.Module) -> None:
    """Take every lean layer out again."""
    for module in model.modules():
        for layer in anatomy_of(type(module))[1]:
            if layer in (Watched, Recomputed) or issubclass(layer, lean.Lean):
                unswap(module, layer)
        for name in ("_lean_plain", "_lean_off", "_lean_again"):
            module.__dict__.pop(name, None)


def _own_forward(module: nn.Module) -> Any:
    own: Any = original_class(module)
    return own.forward


def pause(module: nn.Module, off: bool) -> None:
    """Let a layer run as it is (``off``), because its own weight is trained or changed, or be lean again."""
    if off:
        module.__dict__["_lean_off"] = True
    else:
        module.__dict__.pop("_lean_off", None)


_IN_ADAPTERS = (lean.Elementwise, lean.LeanHardtanh, lean.LeanLeakyReLU, lean.LeanHardsigmoid)
"""What an adapter's own layers gain from: those whose output follows from their input, and those that keep their input
beside it. A ReLU keeps its output, which the next layer keeps anyway."""

PLAIN_FORWARDS = {
    layer.forward for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
"""Forwards that are one operator on the layer's parameters, for the compiled form."""
