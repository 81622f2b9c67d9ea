"""Routing: every row of a batch through its own adapter and head, in one forward of the shared backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftError, nearest
from ..swap import original_class, swap, unswap
from .adapter import activate, active, adapters, registry_of
from .graft import Args, GraftPoint, Kwargs, existing_point, first_output, first_tensor, replace_output
from .memory import stand_aside


@contextlib.contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Run row i of every batch inside the ``with`` block through adapter ``names[i]``.

    The result equals running the rows apart. Layers that no adapter of the batch touches run once for the
    whole batch, as do touched layers whose adapters only add to the output; layers with a changed weight run
    once per adapter. When the heads have different numbers of classes the model returns a list with one tensor
    per row.

    Args:
        model: A model with adapters.
        names: One name per row; None: the plain backbone. Modules that fold other axes into the batch
            (windows, frames) must keep the rows' order, as all known ones do.

    Raises:
        GraftError: An unknown name, no names, or an adapter is merged.
    """
    known = adapters(model)
    if known and (merged := registry_of(model).merged) is not None:
        raise GraftError(f"route: adapter {merged.name!r} is merged into the weights of every row; unmerge first")
    if not names:
        raise GraftError("route: no names given; expected one adapter name per row of the batch")
    for name in names:
        if name is not None and name not in known:
            raise GraftError(f"route: the model has no adapter {name!r}; {nearest(str(name), known)}")
    before = active(model)
    whole = not all(known[n].splits for n in names if n is not None)
    points = [p for p in map(existing_point, model.modules()) if p is not None]
    router = Router(list(names), points, whole)
    try:
        for module in model.modules():
            if (point := existing_point(module)) is not None:
                point.router = router
                stand_aside(module, point, routed=True)
        model.__dict__["_torchgraft_router"] = router
        swap(model, RoutesWhole)
        yield
    finally:
        unswap(model, RoutesWhole)
        del model.__dict__["_torchgraft_router"]
        for point in points:
            point.router = None
        activate(model, before)


class RoutesWhole:
    """In front of a routed model: where a module inside cannot be split by rows, the whole model is."""

    swap_rank = -1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, split inside; failing that, once per adapter."""
        router: Router = self.__dict__["_torchgraft_router"]
        if not router.whole:
            try:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
            except _CannotSplitError:
                router.whole = True
        return router.run_whole(super().forward, args, kwargs)  # type: ignore[misc]


class _CannotSplitError(GraftError):
    """Rows of what a module got cannot be told apart by adapter."""


class Router:
    """Splits what arrives at a module by adapter, and puts the results together again."""

    def __init__(self, names: list[str | None], points: list[GraftPoint], whole: bool) -> None:
        self.points, self.whole = points, whole
        self._split(names)

    def _split(self, names: list[str | None]) -> None:
        self.names = names
        self.groups = {n: [i for i, m in enumerate(names) if m == n] for n in dict.fromkeys(names)}
        self.inverse = [0] * len(names)
        for position, row in enumerate(r for rows in self.groups.values() for r in rows):
            self.inverse[row] = position

    @contextlib.contextmanager
    def _only(self, name: str | None) -> Iterator[None]:
        """Inside, every row belongs to ``name``: adapted modules inside a split module do not split again."""
        names = self.names
        self._split([name])
        try:
            yield
        finally:
            self._split(names)

    def run(self, module: Any, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """The adapted forward of ``module``; ``forward`` is its own."""
        point: GraftPoint = module._modules["torchgraft"]
        if not any(name in point.actions for name in self.groups if name is not None):
            point.select(None)
            return forward(*args, **kwargs)
        if len(self.groups) == 1:
            return self._one(point, next(iter(self.groups)), forward, args, kwargs)
        try:
            size = first_tensor(args, kwargs).shape[0]
        except TypeError as error:
            raise _CannotSplitError(f"route: {original_class(module).__name__} is called without a tensor") from error
        if size % len(self.names):
            raise _CannotSplitError(
                f"route: a module got {size} rows, which {len(self.names)} names do not divide; "
                "give one name per row of the batch, and call the model itself"
            )
        rows = {name: self._rows(indices, size) for name, indices in self.groups.items()}
        if all(self._adds_only(point, name) for name in self.groups):
            return self._shared(point, forward, args, kwargs, rows)
        if kwargs.get("past_key_values") is not None:
            raise _CannotSplitError(f"route: {original_class(module).__name__} fills a cache with all rows at once")
        parts = []
        for name, index in rows.items():
            with self._only(name):
                parts.append(self._one(point, name, forward, *_take(args, kwargs, index, size)))
        return self._join(parts, size)

    def run_whole(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """The whole model once per adapter, for models whose inner modules cannot be split."""
        size = first_tensor(args, kwargs).shape[0]
        if size % len(self.names):
            raise GraftError(f"route: the batch has {size} rows and {len(self.names)} names; give one name per row")
        parts = []
        for name, index in {n: self._rows(i, size) for n, i in self.groups.items()}.items():
            with self._only(name):
                for point in self.points:
                    point.select(name)
                own_args, own_kwargs = _take(args, kwargs, index, size)
                parts.append(forward(*own_args, **own_kwargs))
        return self._join(parts, size)

    def _shared(
        self, point: GraftPoint, forward: Callable[..., Any], args: Args, kwargs: Kwargs, rows: dict[Any, Tensor]
    ) -> Any:
        """The module once for all rows, the actions by group."""
        size = first_tensor(args, kwargs).shape[0]
        taken = {name: _take(args, kwargs, index, size) for name, index in rows.items()}
        for name, (own_args, own_kwargs) in taken.items():
            point.select(name)
            for action in point.before:
                action.before(own_args, own_kwargs)
        out = forward(*args, **kwargs)
        parts = []
        for name, index in rows.items():
            point.select(name)
            part = replace_output(out, first_output(out)[index])
            for action in point.after:
                part = action.after(*taken[name], part)
            parts.append(part)
        joined = self._join([first_output(p) for p in parts], size)
        return replace_output(out, joined)

    def _one(self, point: GraftPoint, name: str | None, forward: Any, args: Args, kwargs: Kwargs) -> Any:
        """The ordinary adapted forward for one adapter's rows."""
        point.select(name)
        for action in point.before:
            args, kwargs = action.before(args, kwargs)
        out = point.around[0].around(forward, args, kwargs) if point.around else forward(*args, **kwargs)
        for action in point.after:
            out = action.after(args, kwargs, out)
        return out

    def _join(self, parts: list[Any], size: int) -> Any:
        """Rows back in their order: a tensor, a tuple of them, or a list when their shapes differ."""
        if isinstance(parts[0], Mapping):
            kind: Any = type(parts[0])
            return kind({k: self._join([p[k] for p in parts], size) for k in parts[0]})
        if isinstance(parts[0], (tuple, list)):
            return type(parts[0])(self._join([p[i] for p in parts], size) for i in range(len(parts[0])))
        if not isinstance(parts[0], Tensor):
            return parts[0]
        if sum(len(p) for p in parts) != size:
            return parts[0]  # one for all rows: the position bias that T5's first layer hands on
        fold = size // len(self.names)
        order = torch.tensor(self.inverse, device=parts[0].device)
        if fold > 1:
            order = (order[:, None] * fold + torch.arange(fold, device=order.device)).flatten()
        if len({p.shape[1:] for p in parts}) > 1:
            flat = [row for part in parts for row in part]
            return [flat[i] for i in order.tolist()]
        return torch.cat(parts).index_select(0, order)

    def _rows(self, indices: list[int], size: int) -> Tensor:
        fold = size // len(self.names)
        return torch.tensor([i * fold + j for i in indices for j in range(fold)])

    @staticmethod
    def _adds_only(point: GraftPoint, name: str | None) -> bool:
        """Whether the adapter's actions here leave the arguments and the weights alone."""
        actions = point.actions.get(name, []) if name is not None else []
        return all(when == "after" or (when == "before" and getattr(a, "reads_only", False)) for when, a in actions)


def _take(args: Args, kwargs: Kwargs, index: Tensor, size: int) -> tuple[Args, Kwargs]:
    """The rows ``index`` of every argument that has ``size`` of them."""

    def pick(value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        return value.index_select(0, index.to(value.device)) if rows else value

    return tuple(pick(a) for a in args), {k: pick(v) for k, v in kwargs.items()}
