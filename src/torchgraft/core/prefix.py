"""Finding the cut: how much of an adapted model is the same for an image in every epoch.

A candidate is the input or the output of a module that carries one tensor, which depends on no trained parameter,
and in front of which no adapter acts. The latest candidate is taken whose tensor is all that the rest of the model
needs. Whether it is that, is tried: the model runs from the cut, with not-a-number in place of everything else
that was computed before, and must return what it returns for the images.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import GraftError
from ..swap import has_layer
from .blocks import find_stages
from .boundaries import Boundary, Call, first_if_any, for_any_number, record, tensors_of
from .comparing import relative_error
from .cut import BatchShape, Cut, from_cut, until_cut
from .frozen import HeldInEval
from .graft import existing_point
from .layers import is_batchnorm
from .placements import BatchStats
from .placements.base import Side
from .probe import Example, dry_run, in_eval_mode

__all__ = ["Cut", "find_cut", "from_cut", "until_cut"]

_SAME = 1e-5
"""Largest relative difference between the model's output and what it returns from the cut on."""
_SAME_ROW = 1e-3
"""Likewise between an image alone and in a batch, for which other kernels may be chosen."""


def find_cut(model: nn.Module, example: Example | None = None) -> Cut:
    """The latest module boundary in front of everything that the active adapter changes or trains.

    Inside the first adapted block an earlier boundary is preferred where it is smaller: an inverted residual is
    several times wider inside than at its ends.

    Args:
        model: An adapted model that takes images; left as it is.
        example: Positional and keyword arguments of one call, in the size of the later ones; default: guessed.

    Raises:
        GraftError: Nothing can be kept: the first layers are adapted, several tensors cross every boundary, or
            something in front of the cut is random or follows the batches in training.
    """
    example = _example(model, example)
    images = _batch(example, 2, seed=0)
    with in_eval_mode(model):
        seen, out = record(model, images)
        other, _ = record(model, _batch(example, 2, seed=1))
        one, _ = record(model, tree_map_only(Tensor, lambda t: t[:1], images))
        run = _Run(model, images, out, for_any_number(model, seen, one, other))
        cut = run.best()
    _check_training(model, cut)
    return cut


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A boundary, and when it was passed."""

    time: int
    path: str
    side: Side
    at: Boundary

    @property
    def size(self) -> int:
        return math.prod(self.at.shape)


_Event = tuple[int, str, Side, Boundary | None]


class _Run:
    """What was recorded of a model, and the choice of a cut by it."""

    def __init__(self, model: nn.Module, images: Example, out: list[Tensor], calls: list[Call]) -> None:
        self.model, self.images, self.out, self.calls = model, images, out, calls
        self.blocks = {block.path for stage in find_stages(model) for block in stage.blocks}

    def best(self) -> Cut:
        """The cut behind which as little as possible runs again.

        Raises:
            GraftError: There is none.
        """
        tried = [c for c in self._candidates() if self._skipped(c)]
        ends = [c for c in tried if not self._inside_block(c.path)]
        base = next((c for c in reversed(ends) if self._carries_all(self._cut(c))), None)
        if base is None:
            raise GraftError(self._why_none(several=bool(ends)))
        inner = [c for c in tried if c.time > base.time and c.size <= base.size and self._inside_block(c.path)]
        smallest = sorted(inner, key=lambda c: (c.size, -c.time))
        return self._cut(next((c for c in smallest if self._carries_all(self._cut(c))), base))

    def _candidates(self) -> list[_Candidate]:
        """Boundaries with one tensor that no training reaches, in the order of time; each tensor once."""
        counts = Counter(call.path for call in self.calls)
        events: list[_Event] = []
        for call in self.calls:
            events += [(call.entered, call.path, "input", call.given), (call.left, call.path, "output", call.gave)]
        found: dict[tuple[int, int], _Candidate] = {}
        returned = None
        for time, path, side, at in sorted(events, key=lambda event: event[0]):
            repeats = at is not None and side == "output" and at.key == returned
            returned = at.key if at is not None and side == "output" else None
            if at is None or at.trained or not at.dtype.is_floating_point or counts[path] > 1:
                continue
            # Of modules that return one tensor in turn the outermost stands for all; else the first that has it.
            if repeats or at.key not in found:
                found[at.key] = _Candidate(time, path, side, at)
        return sorted(found.values(), key=lambda candidate: candidate.time)

    def _cut(self, candidate: _Candidate) -> Cut:
        behind = {call.path for call in self.calls if call.entered > candidate.time}
        skipped = self._skipped(candidate)
        shape, strides = candidate.at.shape[1:], candidate.at.stride[1:]
        return Cut(
            path=candidate.path,
            side=candidate.side,
            shape=shape,
            dtype=candidate.at.dtype,
            order=tuple(sorted(range(len(shape)), key=lambda axis: -strides[axis])),
            inputs=tree_map_only(Tensor, _per_image, self.images),
            skipped=skipped,
            shared=frozenset(skipped.keys() & behind),
        )

    def _skipped(self, candidate: _Candidate) -> dict[str, tuple[Any, ...]]:
        """What need not run for a cut; nothing where an adapter acts there or an output cannot be stood in for."""
        open_calls = {i for i, c in enumerate(self.calls) if c.entered <= candidate.time < c.left}
        done = [c for c in self.calls if c.left <= candidate.time and (c.caller is None or c.caller in open_calls)]
        skipped: dict[str, list[Any]] = {}
        for call in done:
            shapes = [leaf for leaf in tree_leaves(call.returned) if isinstance(leaf, BatchShape)]
            if _acts(self.model.get_submodule(call.path)):
                return {}
            if call.constant:  # it runs as ever: what it returns (positions, for instance) may go anywhere
                continue
            if not all(shape.dtype.is_floating_point for shape in shapes):
                return {}
            skipped.setdefault(call.path, []).append(call.returned)
        return {path: tuple(outputs) for path, outputs in skipped.items()}

    def _carries_all(self, cut: Cut) -> bool:
        """Whether the model returns the same from the tensor at the cut alone."""
        args, kwargs = self.images
        try:
            with until_cut(self.model, cut) as prefix:
                kept = prefix(*args, **kwargs).clone()
                first = prefix(*(_row(a) for a in args), **{k: _row(v) for k, v in kwargs.items()}).clone()
            if first.shape[0] != 1 or tuple(first.shape[1:]) != cut.shape or kept.shape[0] != 2:
                return False
            with from_cut(self.model, cut), torch.no_grad():
                found = tensors_of(self.model(kept))
        except Exception:  # whatever a module says to a not-a-number or to a missing tensor: this is no cut
            return False
        if len(found) != len(self.out) or relative_error(first, kept[:1]) > _SAME_ROW:
            return False
        # Not-a-number compares as false: whatever leaked past the cut shows here.
        return all(relative_error(mine, whole) < _SAME for mine, whole in zip(found, self.out, strict=True))

    def _inside_block(self, path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[:i]) in self.blocks for i in range(1, len(parts)))

    def _why_none(self, several: bool) -> str:
        trained = [c for c in self.calls if c.gave is not None and c.gave.trained]
        first = min(trained, key=lambda c: c.left).path if trained else "the first layer"
        if several:
            return (
                f"prefix cache: at no module boundary in front of {first!r}, the first that is trained, does a single "
                "tensor carry everything on; train without the cache"
            )
        return (
            f"prefix cache: the adapter acts as early as in {first!r}, so there is nothing to keep; adapt later sites "
            "only (include=) or train without the cache"
        )


def _per_image(tensor: Tensor) -> BatchShape:
    return BatchShape((1, *tensor.shape[1:]), (1,) + (0,) * (tensor.dim() - 1), tensor.dtype)


def _row(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t[:1], value)


def _acts(module: nn.Module) -> bool:
    """Whether an adapter does anything at the module or inside it, its statistics apart."""
    for inner in module.modules():
        point = existing_point(inner)
        if point is None:
            continue
        actions = (*point.before, *point.around, *point.after, *(a for views in point.views.values() for a in views))
        if any(not isinstance(action, BatchStats) for action in actions):
            return True
    return False


def _example(model: nn.Module, example: Example | None) -> Example:
    if example is None:
        found = dry_run(model)
        example = ((), {}) if found is None else found.example
    tensor = first_if_any(*example)
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 4:
        raise GraftError(
            f"prefix cache: {type(model).__name__} takes no batch of images as far as a dry run could tell; "
            "give find_cut(..., example=(args, kwargs))"
        )
    return example


def _batch(example: Example, images: int, *, seed: int) -> Example:
    """Random images like those of the example."""
    generator = torch.Generator().manual_seed(seed)

    def fresh(tensor: Tensor) -> Tensor:
        shape = (images, *tensor.shape[1:])
        if not tensor.is_floating_point():
            return tensor[:1].expand(shape)
        values = torch.randn(shape, generator=generator).to(tensor)
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return values.contiguous(memory_format=torch.channels_last) if last else values

    args, kwargs = tree_map_only(Tensor, fresh, example)
    return args, kwargs


def _check_training(model: nn.Module, cut: Cut) -> None:
    """Nothing in front of the cut may be random, or follow the batches, in training."""
    for path in cut.skipped:
        for inner, module in model.get_submodule(path).named_modules(prefix=path):
            held = has_layer(module, HeldInEval)
            if is_batchnorm(module) and (not held or _follows(module)):
                raise GraftError(
                    f"prefix cache: the BatchNorm {inner!r} in front of the cut follows the batches, so nothing behind "
                    'it can be kept; attach with batchnorm="frozen"'
                )
            if not held and _has_rate(module):
                raise GraftError(
                    f"prefix cache: {inner!r} in front of the cut drops values at random; attach with dropout=False"
                )


def _follows(module: nn.Module) -> bool:
    point = existing_point(module)
    return point is not None and any(isinstance(action, BatchStats) for action in point.before)


def _has_rate(module: nn.Module) -> bool:
    """Whether the module holds a rate above zero at which it drops something."""
    drops = any(word in type(module).__name__ for word in ("Drop", "Depth"))
    return any(
        isinstance(v, float) and v > 0 and ("drop" in k or (drops and k == "p")) for k, v in vars(module).items()
    )
