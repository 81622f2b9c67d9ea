"""What a training step keeps for the backward, level by level, foretold on a copy of the model without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ..lean import meter
from ..lean.install import LEVELS, level_of
from .adapter import activate, adapters, detach
from .ghosts import fake_on_cpu, without_data
from .probe import Example

NEEDS_DATA = (RuntimeError, NotImplementedError, TypeError, StopIteration)
"""What models raise whose forward depends on values that a copy without data does not have."""


class Kept:
    """Bytes that autograd keeps for the backward of a training step, each counted when it is first asked for.

    Args:
        adapted: The model with one adapter, on the meta device; it is not changed.
        example: One input, on the meta device.
        batch: How often the input is repeated.
    """

    def __init__(self, adapted: nn.Module, example: Example, batch: int) -> None:
        self._adapted = adapted
        args, kwargs = tree_map_only(Tensor, lambda t: t.repeat(batch, *[1] * (t.dim() - 1)), example)
        self._example: Example = args, kwargs
        self._found: dict[str, int | None] = {}

    def at(self, level: str) -> int | None:
        """Bytes with the lean layers of ``level`` (``"off"``: none); None when the model cannot run without data."""
        return self._counted(level)

    def in_full(self) -> int | None:
        """Bytes when every parameter of the plain model is trained, its BatchNorms in training mode."""
        return self._counted(None)

    def by_level(self) -> dict[str, int]:
        """Bytes at every level that can be told."""
        found = {level: self.at(level) for level in ("off", *LEVELS)}
        return {level: size for level, size in found.items() if size is not None}

    def _counted(self, level: str | None) -> int | None:
        key = level or "full"
        if key not in self._found:
            self._found[key] = None
            with contextlib.suppress(*NEEDS_DATA), _no_real_draws():
                self._found[key] = self._count(level)
        return self._found[key]

    def _count(self, level: str | None) -> int:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        model, example = without_data(self._adapted, self._example, fake_on_cpu(fakes))
        if level is None:
            detach(model)
            model.requires_grad_(True)
        else:
            name, adapter = next(iter(adapters(model).items()))
            adapter.lean = level_of(level)
            activate(model, name)
        with fakes:
            try:
                return saved_bytes(model.train(), example)
            except ValueError:  # BatchNorms in training mode refuse a map of one pixel in a batch of one
                return saved_bytes(model.eval(), example)


def saved_bytes(model: nn.Module, example: Example) -> int:
    """Bytes that autograd keeps for the backward of one forward, the model's own tensors and the input excluded.

    See :func:`torchgraft.lean.meter.saved_tensors`.
    """
    given: list[Tensor] = []
    tree_map_only(Tensor, given.append, example)
    own = (*model.parameters(), *model.buffers(), *given)
    return meter.saved_bytes(lambda: model(*example[0], **example[1]), own)


@contextlib.contextmanager
def _no_real_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield
