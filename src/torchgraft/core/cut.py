"""Running a model from the middle: nothing below a cut is computed, the tensor there is given.

With frozen weights and fixed transforms, everything in front of the first adapted site is the same for an image
in every epoch. A :class:`Cut` names one module boundary at which a single tensor carries all of it
(:func:`torchgraft.core.prefix.find_cut` finds one). :func:`until_cut` computes that tensor, and :func:`from_cut`
lets the model start from it:

    cut = find_cut(model)
    with until_cut(model, cut) as prefix:
        kept = prefix(images)
    with from_cut(model, cut):
        logits = model(kept)

The modules in front of the cut are swapped for ones that return stand-ins: not-a-numbers of the right shape that
take no memory, so that the code between modules still runs and a value that leaked past the cut cannot go unseen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import GraftError
from ..swap import has_layer, swap, unswap
from .graft import first_tensor, recomputing, replace_first
from .placements.base import Point, Side
from .probe import Example

_STATE = "_torchgraft_passage"
"""The attribute under which a module that takes part knows the forward that is under way."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a tensor as a function of the number of images.

    Attributes:
        one: Shape for one image.
        growth: What each axis grows by with every further image.
        dtype: Its type.
    """

    one: tuple[int, ...]
    growth: tuple[int, ...]
    dtype: torch.dtype

    def stand_in(self, images: int, device: torch.device) -> Tensor:
        """A tensor of this shape, all not-a-number (zero where the type has none), that takes no memory."""
        shape = [n + g * (images - 1) for n, g in zip(self.one, self.growth, strict=True)]
        fill = math.nan if self.dtype.is_floating_point or self.dtype.is_complex else 0
        return torch.full((), fill, dtype=self.dtype, device=device).expand(shape)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A module boundary at which one tensor carries on everything that was computed.

    Attributes:
        path: Path of the module.
        side: Whether its input or its output is the boundary.
        shape: Shape of the tensor for one image, without the batch axis.
        dtype: Its type.
        order: The axes of ``shape`` from the slowest to the fastest in memory, so that a tensor that is given has
            the very layout of one that was computed (channels-last maps, for instance).
        inputs: What the model is called with, shapes in place of tensors.
        skipped: Path -> what the module returned, call by call, of every module that need not run.
        shared: Those of them that run again behind the cut.
    """

    path: str
    side: Side
    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    inputs: Example
    skipped: Mapping[str, tuple[Any, ...]]
    shared: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return str(Point(self.path, self.side))

    def bytes_per_image(self, dtype: torch.dtype) -> int:
        """Bytes of the tensor of one image, kept as ``dtype``."""
        return math.prod(self.shape) * dtype.itemsize

    def to_rows(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, *shape) -> the same values in the order of memory, contiguous, as ``dtype``; always a copy."""
        axes = (0, *(1 + a for a in self.order))
        return tensor.permute(axes).to(dtype, copy=True, memory_format=torch.contiguous_format)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`to_rows`, as a view in the layout that the model computes."""
        return rows.permute(0, *(1 + self.order.index(a) for a in range(len(self.order))))


@contextlib.contextmanager
def from_cut(model: nn.Module, cut: Cut) -> Iterator[None]:
    """Inside, ``model(tensor)`` takes the tensor at the cut, (N, *cut.shape) of any floating type, and runs from there.

    Everything else about the model stays: its parameters, keys and adapters, training and evaluation mode.

    Raises:
        GraftError: The model runs from a cut already; or, when called, the tensor does not have the cut's shape.
    """
    if has_layer(model, _Starts):
        raise GraftError("from_cut: the model runs from a cut already; leave the first `with` block")
    passage = _Passage(cut)
    layers: list[tuple[str, type]] = [("", _Starts), (cut.path, _Feeds)]
    layers += [(path, _Skips) for path in cut.skipped if path != cut.path]
    with _swapped(model, layers, passage):
        yield


@contextlib.contextmanager
def until_cut(model: nn.Module, cut: Cut) -> Iterator[Callable[..., Tensor]]:
    """Yields a function that takes what the model takes and returns the tensor (N, *cut.shape) at the cut.

    Nothing behind the cut runs, and no gradient is kept. The tensor is to be copied before it is changed.
    """

    @torch.no_grad()
    def prefix(*args: Any, **kwargs: Any) -> Tensor:
        try:
            model(*args, **kwargs)
        except _Reached as reached:
            return reached.tensor
        raise RuntimeError(f"the forward did not pass the cut, the {cut}")

    with _swapped(model, [(cut.path, _Stops)], _Passage(cut)):
        yield prefix


class _Passage:
    """One forward at a time through the modules that take part."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.given: Tensor | None = None
        self.images = 0
        self.device = torch.device("cpu")
        self.calls: Counter[str] = Counter()

    def start(self, tensor: Tensor) -> Example:
        """Keep the tensor for the cut; what to call the model with in the meantime."""
        if tuple(tensor.shape[1:]) != self.cut.shape:
            raise GraftError(
                f"from_cut: a tensor of shape {tuple(tensor.shape)} was given; "
                f"expected (N, {', '.join(map(str, self.cut.shape))}), what goes through the {self.cut}"
            )
        self.given, self.images, self.device = tensor, len(tensor), tensor.device
        self.calls.clear()
        return self._stand_ins(self.cut.inputs)

    def returned(self, path: str) -> Any:
        """What a module in front of the cut returns."""
        outputs = self.cut.skipped[path]
        number = min(self.calls[path], len(outputs) - 1)
        self.calls[path] += 1
        return self._stand_ins(outputs[number])

    def take(self) -> Tensor:
        """The tensor at the cut, in the layout and type that the model computes; a copy."""
        tensor, self.given = self.given, None
        if tensor is None:
            again = "again, in a checkpoint that begins below it" if recomputing() else "twice in one forward"
            raise RuntimeError(f"the cut, the {self.cut}, was passed {again}; it can be passed once")
        return self.cut.from_rows(self.cut.to_rows(tensor, self.cut.dtype))

    def _stand_ins(self, shapes: Any) -> Any:
        return tree_map_only(BatchShape, lambda shape: shape.stand_in(self.images, self.device), shapes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": None}


class _Starts:
    """The model: called with the tensor at the cut."""

    swap_rank = -3

    def forward(self, tensor: Tensor) -> Any:
        passage: _Passage = self.__dict__[_STATE][0]
        args, kwargs = passage.start(tensor)
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if passage.given is not None:
            raise RuntimeError(f"the forward did not pass the cut, the {passage.cut}")
        return out


class _Skips:
    """A module in front of the cut: does not run."""

    swap_rank = -3

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passage, path = self.__dict__[_STATE]
        if passage.given is None and path in passage.cut.shared:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return passage.returned(path)


class _Feeds:
    """The module at the cut: its input or its output is what was given."""

    swap_rank = -3

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passage: _Passage = self.__dict__[_STATE][0]
        if passage.cut.side == "output":
            return passage.take()
        args, kwargs = replace_first(args, kwargs, passage.take())
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Stops:
    """The module at the cut, where only the way there is wanted."""

    swap_rank = -3

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cut: Cut = self.__dict__[_STATE][0].cut
        if cut.side == "input":
            raise _Reached(first_tensor(args, kwargs))
        raise _Reached(super().forward(*args, **kwargs))  # type: ignore[misc]


class _Reached(Exception):
    """Ends a forward at the cut."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


@contextlib.contextmanager
def _swapped(model: nn.Module, layers: list[tuple[str, type]], passage: _Passage) -> Iterator[None]:
    modules = [(path, model.get_submodule(path), layer) for path, layer in layers]
    try:
        for path, module, layer in modules:
            module.__dict__[_STATE] = passage, path
            swap(module, layer)
        yield
    finally:
        for _, module, layer in modules:
            unswap(module, layer)
            module.__dict__.pop(_STATE, None)
