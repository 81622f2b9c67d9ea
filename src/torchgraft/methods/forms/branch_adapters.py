"""Where adapters stand: behind what a residual branch returns, or beside the branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from torch import nn

from ...core.anatomy import Anatomy
from ...core.branches import Branch
from ...core.layers import ACTIVATIONS, is_conv
from ...core.placements import Parallel, Placement, Point, Sequential
from ...errors import GraftError, nearest

Sublayer = Literal["attn", "mlp"]
AdapterInput = Literal["pre_norm", "post_norm"]
Layer = Callable[[int, int, int], nn.Module]
"""From (width read, width changed, axis) to the form."""

_KINDS = {"attn": ("attn", "cross"), "mlp": ("mlp",)}


def adapted_branches(anatomy: Anatomy, name: str, sites: Iterable[Sublayer]) -> list[Branch]:
    """The branches of the selected blocks that a method called ``name`` adapts; cross-attention is attention.

    Raises:
        GraftError: There are none.
    """
    asked = tuple(sites)
    found = anatomy.branches(*(kind for site in asked for kind in _KINDS[site]))
    if not found:
        wanted = " or ".join({"attn": "attention", "mlp": "MLP"}[site] for site in asked)
        raise GraftError(
            f"{name}: no block of {type(anatomy.model).__name__} that is selected has {wanted} sub-layers with a "
            "residual sum, where its adapters stand; use conv-adapter on a ConvNet"
        )
    return found


def behind(anatomy: Anatomy, branch: Branch, layer: Layer) -> Placement:
    """``h + f(h)`` on what the branch returns, before dropout, LayerScale and DropPath."""
    return sequential(anatomy, branch.returns, channel_axis(anatomy, branch), layer)


def beside(anatomy: Anatomy, branch: Branch, layer: Layer, adapter_input: AdapterInput) -> Placement:
    """``+ f(x)`` outside the branch, behind LayerScale and DropPath; x as it is before or behind the branch's norm."""
    source = branch.stream if adapter_input == "pre_norm" else branch.reads
    axis = channel_axis(anatomy, branch)
    form = layer(anatomy.shape(source)[axis], anatomy.shape(branch.adds)[axis], axis)
    return Parallel(form, source, branch.adds)


def sequential(anatomy: Anatomy, at: Point, axis: int, layer: Layer) -> Placement:
    """``h + f(h)`` at a point."""
    width = anatomy.shape(at)[axis]
    return Sequential(layer(width, width, axis), at)


def channel_axis(anatomy: Anatomy, branch: Branch) -> int:
    """The axis of the channels in a branch: 1 where its layers are convolutions, else the last."""
    return 1 if is_conv(anatomy.module(branch.last)) else -1


def check_options(name: str, *, width: int, act: str = "relu", sites: tuple[Sublayer, ...] | None = None) -> None:
    """Refuse options that no adapter can be built from.

    Raises:
        GraftError: Names the option and what was expected.
    """
    if width < 1:
        raise GraftError(f"{name}: width={width} is not valid; expected a whole number of at least 1")
    if act not in ACTIVATIONS:
        raise GraftError(f"{name}: act={act!r}; {nearest(act, ACTIVATIONS)}")
    if sites is not None and (not sites or any(site not in _KINDS for site in sites)):
        raise GraftError(f"{name}: sites={sites!r} is not valid; expected a list of attn, mlp or both")
