"""What an official system is: which method its checkpoint holds, and where each of its tensors goes with us."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from ..core.method import Method

_DERIVED = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index|attn_mask)$")
_systems: dict[str, type[System]] = {}
S = TypeVar("S", bound="type[System]")


class UnknownKeyError(KeyError):
    """A key that has no place in the system."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one official tensor goes.

    Attributes:
        owner: The backbone, the adapter or its head.
        path: Path of the module in our host: empty for the model itself and for the head. For an adapter also
            that of a block which holds one placement that owns ``name``.
        name: The tensor inside: a parameter or buffer of the backbone's module, the name under which the
            adapter's placement saves it, ``weight`` or ``bias`` of the head.
        slot: Which placement, where the adapter has several at the module.
        part: (i, n): the tensor is the i-th of n equal parts of ours along the first axis (q, k, v -> qkv).
        change: Linear change of layout from official to ours; it serves gradients too.
    """

    owner: Literal["backbone", "adapter", "head"]
    path: str
    name: str
    slot: str | None = None
    part: tuple[int, int] | None = None
    change: Callable[[Tensor], Tensor] | None = None


class System(ABC):
    """One published code base; a subclass knows its key names.

    Args:
        model: Our backbone, not yet adapted; a system may look at it to tell one kind of host from another.
        options: What the checkpoint's shapes do not tell (a scale), by the method's own option names.
    """

    name: ClassVar[str] = ""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.options = model, options

    @abstractmethod
    def method(self, state: Mapping[str, Tensor]) -> Method:
        """The method that the checkpoint holds: from the shapes of its tensors and the options."""

    @abstractmethod
    def place(self, key: str) -> Place | None:
        """Where an official tensor goes; None: known, and not needed.

        Raises:
            UnknownKeyError: The system has no such tensor.
        """

    def is_dead(self, key: str) -> bool:
        """Whether the official module owns this tensor and never uses it."""
        return False

    def num_classes(self, state: Mapping[str, Tensor]) -> int | None:
        """Outputs of the checkpoint's classifier, None when it holds none."""
        for key, tensor in state.items():
            try:
                place = None if is_derived(key) or self.is_dead(key) else self.place(key)
            except UnknownKeyError:
                continue  # loading says so, with the name of the key
            if place is not None and place.owner == "head" and place.name == "weight":
                return tensor.shape[0]
        return None


def is_derived(key: str) -> bool:
    """Whether a tensor is a function of the configuration (or counts batches), so that it need not be loaded."""
    return _DERIVED.search(key) is not None


def register_system(name: str) -> Callable[[S], S]:
    """Class decorator that makes a system known under ``name``."""

    def add(cls: S) -> S:
        cls.name = name
        _systems[name] = cls
        return cls

    return add


def registered() -> dict[str, type[System]]:
    """Every system whose module has been imported, by name."""
    return dict(sorted(_systems.items()))
