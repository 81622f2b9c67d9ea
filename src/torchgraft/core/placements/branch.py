"""Branches: Parallel, Sequential and Stream, and the change of layout between tokens and maps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import GraftError
from ..graft import Args, Kwargs, Tap, first_output, first_tensor, replace_first, replace_output
from .base import Hook, Placement, Point


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor at a site holds its channels, and how to show it to a form that wants (N, C, *space).

    Attributes:
        name: ``NC...`` (channels second, nothing to do), ``N...C`` (channels last map) or ``NLC`` (tokens).
        prefix: Leading tokens that are no patches (class and register tokens), for ``NLC``.
        grid: (H, W) of the patch grid, for ``NLC``; None: a square.
    """

    name: str = "NC..."
    prefix: int = 0
    grid: tuple[int, int] | None = None

    def to_map(self, x: Tensor) -> Tensor:
        """Show ``x`` as (N, C, *space); tokens lose their prefix."""
        if self.name == "NC...":
            return x
        if self.name == "N...C":
            return x.movedim(-1, 1)
        x = x[:, self.prefix :]
        n, length, c = x.shape
        h, w = self._grid(length)
        return x.transpose(1, 2).reshape(n, c, h, w)

    def from_map(self, y: Tensor) -> Tensor:
        """Bring a form's output (N, C, *space) back; the prefix tokens get zeros."""
        if self.name == "NC...":
            return y
        if self.name == "N...C":
            return y.movedim(1, -1)
        tokens = y.flatten(2).transpose(1, 2)
        return nn.functional.pad(tokens, (0, 0, self.prefix, 0))

    def _grid(self, length: int) -> tuple[int, int]:
        if self.grid is not None and self.grid[0] * self.grid[1] == length:
            return self.grid
        side = math.isqrt(length)
        if side * side == length:
            return side, side
        if self.grid is not None and length % self.grid[1] == 0:
            return length // self.grid[1], self.grid[1]
        raise GraftError(
            f"{length} tokens form no square grid and the site's grid is {self.grid}; "
            "a spatial form needs a rectangular token grid here"
        )


MAP = Layout()


class Parallel(Placement):
    """``target += form(source)``.

    The source may be the input or output of the same module (no cost beyond the form) or of another
    module that runs earlier; then a tap carries the branch's result to the target. A branch beside a module
    that is no single layer is computed before that module runs, so that in-place operations inside cannot
    change what the branch sees.

    Args:
        form: Module from the source's tensor to something of the target's shape.
        source: Where it reads.
        target: Where it is added.
        layout: How the source holds its channels; the form sees (N, C, *space).
        out_layout: Likewise for the target; default: that of the source.
        early: Compute before the target module runs (needed when the target changes its input in place).
    """

    kind: ClassVar[str] = "parallel"

    def __init__(
        self,
        form: nn.Module,
        source: Point,
        target: Point,
        *,
        layout: Layout = MAP,
        out_layout: Layout | None = None,
        early: bool = False,
        slot: str | None = None,
    ) -> None:
        super().__init__(target.path, slot)
        self.form = form
        self.source, self.target = source, target
        self.layout, self.out_layout = layout, out_layout or layout
        self.local = source.path == target.path and source.side == "input" and target.side == "output" and not early
        self.direct = self.local and self.layout == MAP and self.out_layout == MAP
        self.tap = None if self.local else Tap()

    def hooks(self) -> list[Hook]:
        """One action for a branch around one layer, else a sender and a receiver."""
        if self.local:
            return [Hook(self.home, "after", self)]
        sender = _Sender(self)
        return [
            Hook(self.source.path, "before" if self.source.side == "input" else "after", sender),
            Hook(self.target.path, "before" if self.target.side == "input" else "after", self),
        ]

    def branch(self, x: Tensor) -> Tensor:
        """What is added, for a source tensor ``x``.

        Tokens that are no patches (class, registers) go through the form as images of one pixel.
        """
        y = self.out_layout.from_map(self.form(self.layout.to_map(x)))
        prefix = self.layout.prefix if self.layout.name == "NLC" and self.layout == self.out_layout else 0
        if not prefix:
            return y
        pixels = self.form(x[:, :prefix].reshape(-1, x.shape[-1], 1, 1)).reshape(x.shape[0], prefix, -1)
        return torch.cat([pixels, y[:, prefix:]], dim=1)

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Add to the target's input."""
        assert self.tap is not None
        return replace_first(args, kwargs, first_tensor(args, kwargs) + self.tap.take())

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """Add to the target's output."""
        if self.direct and args and isinstance(out, Tensor):
            # The common case, a branch around one layer, spelled out: every call here is paid per site.
            return out + self._modules["form"](args[0])  # type: ignore[misc]
        delta = self.branch(first_tensor(args, kwargs)) if self.tap is None else self.tap.take()
        return replace_output(out, first_output(out) + delta)


class _Sender:
    """The source half of a tapped :class:`Parallel`."""

    reads_only = True

    def __init__(self, placement: Parallel) -> None:
        self.placement = placement

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self.placement.tap.put(self.placement.branch(first_tensor(args, kwargs)))  # type: ignore[union-attr]
        return args, kwargs

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        self.placement.tap.put(self.placement.branch(first_output(out)))  # type: ignore[union-attr]
        return out


class Sequential(Placement):
    """``h = h + form(h)`` (``skip=True``) or ``h = form(h)`` at the input or output of a module.

    Args:
        form: Module that keeps the shape of what it is given.
        at: Where it acts.
        skip: Whether the identity is added.
        layout: How the tensor holds its channels; the form sees (N, C, *space).
    """

    kind: ClassVar[str] = "sequential"

    def __init__(
        self, form: nn.Module, at: Point, *, skip: bool = True, layout: Layout = MAP, slot: str | None = None
    ) -> None:
        super().__init__(at.path, slot)
        self.form, self.at, self.skip, self.layout = form, at, skip, layout

    def hooks(self) -> list[Hook]:
        """One action at the module's input or output."""
        return [Hook(self.home, "before" if self.at.side == "input" else "after", self)]

    def transform(self, h: Tensor) -> Tensor:
        """The new value of the tensor ``h``."""
        y = self.layout.from_map(self.form(self.layout.to_map(h)))
        return h + y if self.skip else y

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Transform the module's input."""
        return replace_first(args, kwargs, self.transform(first_tensor(args, kwargs)))

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        """Transform the module's output."""
        return replace_output(out, self.transform(first_output(out)))


class Stream(Sequential):
    """``h + form(h)`` on the residual stream: at a block's input, between its branches, or between stages.

    Where the stream is one tensor (the input of a block or a stage) this is :class:`Sequential`. Between the
    branches of a block (``block.mid``) the block's own code has the tensor, once as the input of the second
    branch's norm and once as its skip connection. There the change goes to the norm's input and, carried by a
    tap, to what the branch adds to the skip connection, which is the same sum.

    Args:
        form: Module that keeps the shape of what it is given.
        at: Where the stream is read and changed.
        carry: Where the same change is added again, for the skip connection; a branch's ``adds``.
        layout: How the tensor holds its channels; the form sees (N, C, *space).
    """

    kind: ClassVar[str] = "stream"

    def __init__(
        self,
        form: nn.Module,
        at: Point,
        *,
        carry: Point | None = None,
        layout: Layout = MAP,
        slot: str | None = None,
    ) -> None:
        super().__init__(form, at, layout=layout, slot=slot)
        self.carry = carry
        self.tap = None if carry is None else Tap()

    def hooks(self) -> list[Hook]:
        """One action where the stream is read and, with ``carry``, one where the change is added again."""
        if self.carry is None:
            return super().hooks()
        receiver = Hook(self.carry.path, "before" if self.carry.side == "input" else "after", _Receiver(self))
        return [*super().hooks(), receiver]

    def transform(self, h: Tensor) -> Tensor:
        """The new value of the tensor ``h``; its change is kept for the skip connection."""
        change = self.layout.from_map(self.form(self.layout.to_map(h)))
        if self.tap is not None:
            self.tap.put(change)
        return h + change


class _Receiver:
    """The half of a carried :class:`Stream` that adds the change for the skip connection."""

    def __init__(self, placement: Stream) -> None:
        self.placement = placement

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return replace_first(args, kwargs, first_tensor(args, kwargs) + self.placement.tap.take())  # type: ignore[union-attr]

    def after(self, args: Args, kwargs: Kwargs, out: Any) -> Any:
        return replace_output(out, first_output(out) + self.placement.tap.take())  # type: ignore[union-attr]
