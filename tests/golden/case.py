"""What a builder returns: one published system, built by us, that a golden case can be run on.

Our side addresses every tensor by our own name. ``convert`` maps tensors under official names to ours; the
same map serves the state, the gradients and the state after the forward.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.official.assembly import OfficialError, same_layout

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Merged:
    """What merging gave.

    Attributes:
        deltas: Path of a linear layer -> the increment of its weight, (out, in).
        weights: Our name -> the tensor that acts in the merged network, whether it was folded or stays.
        outputs: What the merged network returned.
    """

    deltas: Tensors
    weights: Tensors
    outputs: Tensors


class StateError(Exception):
    """A state dict lacks a key, or holds one that has no place in our system."""


class GoldenCase(ABC):
    """A system under test. Built in evaluation mode; ``train`` switches it."""

    optional: frozenset[str] = frozenset()
    """Outputs that only some cases of a form store; the others are compared in every case."""

    @abstractmethod
    def name_of(self, key: str) -> str | None:
        """Our name for an official key, or None when a converter may drop it.

        Raises:
            StateError: The key is unknown.
        """

    @abstractmethod
    def state(self) -> Tensors:
        """Our name -> the parameter or buffer that acts on the outputs; every one must be loaded."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters among ``state()``; those that train have ``requires_grad``."""

    @abstractmethod
    def adapter_parameters(self) -> set[str]:
        """The names that the method adds, head excluded."""

    @abstractmethod
    def frozen(self) -> Tensors:
        """What no forward or backward may change, down to the bit."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""

    @abstractmethod
    def run(self, inputs: Tensors) -> Tensors:
        """One forward; returns every tensor that the case names as an output."""

    @abstractmethod
    def loss(self, outputs: Tensors) -> Tensor:
        """The scalar behind the reference's gradients."""

    def merged(self, inputs: Tensors) -> Merged:
        """Merge, run, and undo it; for systems whose cases hold ``extra/``."""
        raise StateError("this system has no merged form to compare 'extra/' with")

    def is_dead(self, key: str) -> bool:
        """Whether the official module owns this tensor and never uses it."""
        return False

    def convert(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Official names and layouts -> ours; what may be dropped is dropped."""
        ours = self.state()
        converted: Tensors = {}
        for key, tensor in tensors.items():
            name = self.name_of(key)
            if name is None:
                continue
            if name not in ours:
                raise StateError(f"official key {key!r} has no place: we have no tensor {name!r}")
            converted[name] = self._fit(key, tensor, ours[name])
        return converted

    @staticmethod
    def _fit(key: str, tensor: Tensor, ours: Tensor) -> Tensor:
        try:
            return same_layout(key, tensor, ours)
        except OfficialError as error:
            raise StateError(str(error)) from error

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load an official state dict; every official key is used and every tensor of ours is set.

        Raises:
            StateError: A key is missing or unknown; nothing was loaded then.
        """
        ours, converted = self.state(), self.convert(state)
        if missing := sorted(ours.keys() - converted.keys()):
            raise StateError(f"the state dict has nothing for {', '.join(missing)}")
        with torch.no_grad():
            for name, tensor in converted.items():
                ours[name].copy_(tensor)

    def counts(self) -> dict[str, int]:
        """Our parameter counts under the names of the JSON file."""
        parameters = self.parameters()
        adapter = self.adapter_parameters()
        return {
            "param_count": sum(p.numel() for p in parameters.values()),
            "trainable_count": sum(p.numel() for p in parameters.values() if p.requires_grad),
            "adapter_count": sum(p.numel() for name, p in parameters.items() if name in adapter),
        }
