"""What the columns of RevCol keep for the backward: the three memory modes.

A level computes ``c = alpha c' + F(lower, upper')`` from maps of its own column and of the one before (primed).

* ``off``: what PyTorch keeps.
* ``recompute``: nothing but the maps between the levels, which are the inputs of every level. In the backward each
  level runs a second time, from the same bits and in the same state of autocast, generators and buffers, so every
  gradient is that of ``off``. A column more costs its four maps more.
* ``reversible``: the maps behind the stem and those of the last column only. In the backward each level also computes
  ``c' = (c - F) / alpha``, from the last column to the first. The error of that grows as ``(1 / |alpha|) ^ (2 N)`` over
  N columns ("Reversible Column Networks", arXiv:2212.11696, has the formula and keeps every column all the same);
  :func:`check_reversible` says when it is too large.

Both work under saved-tensor hooks: the graph of the forward is the ordinary one, only the tensors in it are computed
again when they are asked for. So parameters may be frozen or shared, adapters may be attached, and
``torch.autograd.grad``, distributed training and second derivatives need nothing special. Whoever has to tell the
second run from the first asks :func:`torchgraft.core.graft.recomputing`. Where a graph is traced (compile, export, FX,
TorchScript, functorch) levels run as in ``off``.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.graft import existing_point, recomputing
from ..errors import GraftError, nearest
from ..lean.hooks import traces_eagerly
from ..lean.recompute import SecondRun, random_state, with_random_state
from ..lean.saved import Packed, Reference, keep, outer_hooks, pop, push, unpack

if TYPE_CHECKING:
    from .revcol import Level, RevCol

MODES = ("off", "recompute", "reversible")
"""The memory modes by name."""

WARNS, REFUSES = 1.5, 3.0
"""Limits of ``N log10(1 / min |alpha|)`` in single precision: half the digits that the way back costs."""


def check_mode(mode: str) -> str:
    """``mode`` itself.

    Raises:
        GraftError: There is no such mode.
    """
    if mode not in MODES:
        raise GraftError(f"revcol: memory={mode!r}; {nearest(str(mode), MODES)}")
    return mode


def run_level(level: Level, lower: Any, same: Any, upper: Any, top: Any) -> Tensor:
    """The level's output; what autograd keeps of it is decided by the level's memory mode.

    Args:
        level: The level.
        lower: Map of the level below in this column, or behind the stem.
        same: Map of this level in the column before; None in the first column.
        upper: Map of the level above in the column before, where there is one.
        top: Map of the highest level in the column before, where there is one.
    """
    maps = (lower, same, upper, top)
    if level.memory == "off" or not traces_eagerly() or not all(m is None or isinstance(m, Tensor) for m in maps):
        return level.compute(*maps)
    if level.memory == "reversible":
        return _reversible(level, maps)
    if _is_open(level):
        return level.compute(*maps)
    return _recompute(level, maps)


def _recompute(level: Level, maps: tuple[Any, ...]) -> Tensor:
    return _run_under(SecondRun(_idempotent(level), maps, {}, _own(level), _draws(level)), level, maps)


def _run_under(run: SecondRun, level: Level, maps: tuple[Any, ...]) -> Tensor:
    """The level's output; what it keeps goes to ``run``."""
    push(run.pack, unpack)
    try:
        out = level.compute(*maps)
    finally:
        pop()
    if run.random is not None:
        now = random_state(maps, {})
        if all(torch.equal(a, b) for (_, a), (_, b) in zip(run.random, now, strict=True)):
            run.random = None  # nothing was drawn; the state of the CPU's generator takes 5 kB
    return out


def _idempotent(level: Level) -> Any:
    """The level's computation; a second run leaves no trace in buffers (BatchNorm's statistics)."""
    acting = _acting(level)

    def compute(*maps: Any) -> Tensor:
        with _second_run(level, acting) if recomputing() else contextlib.nullcontext():
            return level.compute(*maps)

    return compute


@contextlib.contextmanager
def _second_run(level: Level, acting: list[Any]) -> Iterator[None]:
    """Computations inside work on copies of the buffers.

    Raises:
        GraftError: Other adapters are active than in the first run.
    """
    now = _acting(level)
    if len(now) != len(acting) or any(a is not b for a, b in zip(now, acting, strict=True)):
        raise GraftError(
            f"revcol: the adapters of {level.place()} were switched between forward and backward; call backward() first"
        )
    owners = [(m, dict(m._buffers)) for m in level.modules() if m._buffers]
    try:
        for module, own in owners:
            module._buffers.update({n: None if b is None else b.clone() for n, b in own.items()})
        yield
    finally:
        for module, own in owners:
            module._buffers.update(own)


def _own(level: nn.Module) -> set[int]:
    """Storages that are there anyway, in both runs; buffers are not, since the second run works on copies."""
    return {p.untyped_storage()._cdata for p in level.parameters()}


def _draws(level: nn.Module) -> bool:
    """Whether the level may draw random numbers (dropout, stochastic depth)."""
    return any(module.training for module in level.modules())


def _acting(level: nn.Module) -> list[Any]:
    """What the active adapters do inside the level."""
    points = [point for m in level.modules() if (point := existing_point(m)) is not None]
    return [a for p in points for a in (*p.before, *p.around, *p.after, *itertools.chain(*p.views.values()))]


def _is_open(level: nn.Module) -> bool:
    """Whether the level depends on more than its arguments.

    So it does where an adapter carries a tensor into it or out of it, and where every row of a batch has an adapter of
    its own, which the ``with`` block around the forward says.
    """
    if any((point := existing_point(m)) is not None and point.router is not None for m in level.modules()):
        return True
    ends: collections.Counter[int] = collections.Counter()
    for action in _acting(level):
        tap = getattr(action, "tap", None) or getattr(getattr(action, "placement", None), "tap", None)
        ends.update([id(tap)] if tap is not None else [])
    return 1 in ends.values()


# -- reversible -----------------------------------------------------------------------------------------------


def smallest_alpha(grid: Sequence[Sequence[Level]]) -> float:
    """The smallest ``|alpha|`` that a division on the way back would have; infinite with one column.

    Args:
        grid: The levels of every column.
    """
    used = [level.used_alpha().detach().abs().amin() for levels in grid[1:] for level in levels]
    return float(torch.stack(used).amin()) if used else math.inf


class AlphaWatch:
    """Looks at the alphas of a reversible network whenever they have changed; warns once."""

    def __init__(self) -> None:
        self.seen: Any = None
        self.warned = False

    def look(self, model: RevCol, x: Any) -> None:
        """See :func:`check_reversible`.

        Args:
            model: The network; nothing is looked at in other memory modes.
            x: The map behind its stem.
        """
        if model.memory != "reversible" or not traces_eagerly() or not isinstance(x, Tensor):
            return
        grid = model.grid()
        state = [(id(level.alpha), level.alpha._version) for levels in grid for level in levels]
        if state == self.seen:
            return
        message = check_reversible(grid)
        if message and not self.warned:
            warnings.warn(message, stacklevel=5)
            self.warned = True
        self.seen = state


def check_reversible(grid: Sequence[Sequence[Level]]) -> str | None:
    """Whether the way back from the last column to the first is accurate enough for gradients.

    Going back over N columns loses about ``2 N log10(1 / min |alpha|)`` decimal digits. Half of that may be 1.5 in
    single precision without a warning and must not be above 3; double precision has 8.7 digits more.

    Args:
        grid: The levels of every column.

    Returns:
        A warning, or None.

    Raises:
        GraftError: It is hopeless, the maps are in half precision, or a level is missing.
    """
    use = 'use memory="recompute"'
    if any(len(levels) < 4 for levels in grid):
        raise GraftError(f"revcol: a pruned network lacks levels that the reversible mode would start from; {use}")
    dtype = grid[0][0].alpha.dtype  # of the maps too, under autocast as well: alpha and gamma promote the sums
    if torch.finfo(dtype).bits < 32:
        raise GraftError(f"revcol: the reversible mode needs maps in single or double precision, not {dtype}; {use}")
    smallest = smallest_alpha(grid)
    lost = len(grid) * -math.log10(smallest) if smallest > 0 else math.inf
    more = (math.log10(torch.finfo(torch.float32).eps) - math.log10(torch.finfo(dtype).eps)) / 2
    said = f"min|alpha| = {smallest:.3g} over {len(grid)} columns, N log10(1/min|alpha|) = {lost:.2f}"
    if lost > REFUSES + more:
        raise GraftError(f"revcol: reversible gradients would be noise: {said}, limit {REFUSES + more:.1f}; {use}")
    if lost > WARNS + more:
        return f"revcol: reversible gradients are inaccurate: {said}, accurate up to {WARNS + more:.1f}; {use}"
    return None


def _reversible(level: Level, maps: tuple[Any, ...]) -> Tensor:
    if _is_open(level):
        raise GraftError(
            f"revcol: adapters carry a tensor past the maps of {level.place()} or are chosen by row, which the "
            'reversible mode cannot follow; use memory="recompute"'
        )
    chain = _chain_through(level, maps)
    run = _Back(chain, level, maps)
    out = _run_under(run, level, maps)
    chain.passed(level, out, run)
    return out


class _Place:
    """Which map of which chain a tensor is; its attribute ``_revcol``."""

    def __init__(self, chain: _Chain, column: int, number: int) -> None:
        self.chain: _Chain | None = chain
        self.column, self.number = column, number


def _chain_through(level: Level, maps: tuple[Any, ...]) -> _Chain:
    """The chain that the level continues; a new one at the first level of the first column.

    Raises:
        GraftError: A map is not what a level of the chain returned.
    """
    lower, same, upper, top = maps
    column, number = level.column, level.number
    if column == number == 0:
        return _Chain(lower)
    known = getattr(lower if number else same, "_revcol", None)
    chain = known.chain if known is not None else None
    came = [(same, column - 1, number), (upper, column - 1, number + 1), (top, column - 1, 3)]
    if number:
        came.append((lower, column, number - 1))
    places = [(getattr(m, "_revcol", None), c, n) for m, c, n in came if m is not None]
    right = all(p is not None and (p.chain, p.column, p.number) == (chain, c, n) for p, c, n in places)
    if chain is None or not right or (number == 0 and chain.source != id(lower)):
        raise GraftError(
            f"revcol: a map was changed on its way to {level.place()} by an adapter or a hook on a level or a column; "
            'the reversible mode inverts c = alpha c\' + F only, so use memory="recompute"'
        )
    return chain


class _Record:
    """What the second run of a level needs besides maps."""

    __slots__ = ("acting", "autocast", "level", "needs", "random")

    def __init__(self, level: Level, run: _Back) -> None:
        self.level, self.acting = level, _acting(level)
        self.autocast, self.random, self.needs = run.autocast, run.random, run.needs


class _Chain:
    """One pass through the columns, and the way back.

    It keeps what is behind the stem and the maps of the last column, and refers to no tensor of the graph.
    """

    def __init__(self, x: Tensor) -> None:
        self.source = id(x)
        self.given: Tensor | None = x
        self.x: Packed | None = None
        self.records: list[_Record] = []
        self.places: list[_Place] = []
        self.latest: list[Tensor] = []
        self.last: list[Packed] = []
        # The way back: how many levels it has passed, the map behind the stem, the maps of the column it is in and of
        # the one before that. Hooks around may allow one unpacking only.
        self.position = 0
        self.stem: Tensor | None = None
        self.maps: list[Any] = []
        self.before: list[Any] = []

    # -- forth --------------------------------------------------------------------------------------------------

    def start_keeping(self, outer: Any) -> None:
        """Something in the graph will ask for a tensor; ``outer``: the hooks around the columns."""
        if self.x is None and self.given is not None:
            self.x, self.given = keep(self.given, outer), None

    def passed(self, level: Level, out: Tensor, run: _Back) -> None:
        """A level has returned ``out``."""
        self.records.append(_Record(level, run))
        if level.number == 0:
            self.latest, self.places = [], []
        place = _Place(self, level.column, level.number)
        out._revcol = place  # type: ignore[attr-defined]
        self.places.append(place)
        self.latest.append(out.detach())
        if level.last and level.number == 3:
            if self.x is not None:
                self.last = [keep(t, outer_hooks()) for t in self.latest]
            for place in self.places:
                place.chain = None  # whoever keeps the maps need not keep the rest
            self.given, self.latest, self.places = None, [], []

    # -- back ---------------------------------------------------------------------------------------------------

    def run_again(self, column: int, number: int, collect: Any) -> None:
        """Go back to a level and run it under the pack hook ``collect``."""
        target = len(self.records) - 1 - (4 * column + number)
        if target < self.position:
            self.position = 0
        while self.position <= target:
            self._back_through_one(collect if self.position == target else None)
        if self.position == len(self.records):
            self.stem, self.maps, self.before = None, [], []

    def _back_through_one(self, collect: Any) -> None:
        index = len(self.records) - 1 - self.position
        column, number = divmod(index, 4)
        if number == 3:
            self.maps = self.before if self.position else [packed.unpack() for packed in self.last]
            self.before = [None] * 4
        if number == 0 and self.stem is None:
            assert self.x is not None
            self.stem = self.x.unpack()
        lower = self.maps[number - 1] if number else self.stem
        upper = self.before[number + 1] if number < 3 else None
        if column or collect is not None:
            given = (lower, upper, self.before[3] if number < 3 else None)
            self.before[number] = self._back(self.records[index], column, self.maps[number], given, collect)
        self.maps[number] = None
        self.position += 1

    @staticmethod
    def _back(record: _Record, column: int, out: Tensor, given: tuple[Any, ...], collect: Any) -> Tensor | None:
        """The map of this level in the column before."""
        level, (device, state) = record.level, record.autocast
        needs_lower, needs_same, needs_upper, needs_top = record.needs
        lower, upper, top = map(_fresh, given, (needs_lower, needs_upper, needs_top))
        grad = torch.set_grad_enabled(collect is not None)
        with (
            grad,
            torch.autocast(device, **state),
            with_random_state(record.random),
            _second_run(level, record.acting),
        ):
            push(collect or Reference, unpack)
            try:
                found = level.branch(lower, upper, top)
                same = None
                if column:
                    with torch.no_grad():
                        same = (out - found) / level.used_alpha()
                if collect is not None:
                    level.join(found, None if same is None else same.requires_grad_(needs_same))
            finally:
                pop()
        return None if same is None else same.detach()


def _fresh(m: Any, need: bool) -> Any:
    return m if m is None else m.detach().requires_grad_(need)


class _Back(SecondRun):
    """One level's forward in a chain, and how to do it again from the chain's other end."""

    def __init__(self, chain: _Chain, level: Level, maps: tuple[Any, ...]) -> None:
        super().__init__(level.compute, maps, {}, _own(level), _draws(level))
        self.chain, self.column, self.number = chain, level.column, level.number
        self.needs = tuple(m is not None and m.requires_grad for m in maps)

    def _keep_inputs(self) -> None:
        self.inputs, self.given = (), None
        self.chain.start_keeping(self.outer)

    def _again(self) -> None:
        count = 0

        def collect(t: Tensor) -> Packed:
            nonlocal count
            if t.untyped_storage()._cdata not in self.own:
                self.values[count] = t.detach()
                count += 1
            return Reference(t)

        self.chain.run_again(self.column, self.number, collect)
