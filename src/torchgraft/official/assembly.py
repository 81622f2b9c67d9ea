"""From tensors under official names to tensors under ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.head import HEAD_SLOT
from ..core.placements import BatchStats, Train
from ..errors import GraftError
from .base import Place, System, UnknownKeyError, is_derived

BACKBONE = "backbone"


class OfficialError(GraftError):
    """A tensor that does not fit, or is missing."""


class Assembly:
    """The map from a system's keys to the tensors of an adapted model.

    Our names: ``backbone.KEY`` for a tensor of the backbone, and what the adapter calls what it owns. A tensor
    of the backbone of which the adapter owns a copy (a trained norm, BatchNorm statistics) goes to the copy.

    Args:
        system: The official side.
        adapter: Our side, attached.
        backbone: The backbone's own tensors by their keys, as they were before attaching.
    """

    def __init__(self, system: System, adapter: Adapter, backbone: Mapping[str, Tensor]) -> None:
        self.system = system
        self._backbone = dict(backbone)
        self._copies: dict[str, str] = {}
        self._owned: dict[str, Tensor] = {}
        self._homes: list[tuple[str, str, str, str, str]] = []  # home, slot, prefix, inner name, our name
        first: dict[int, str] = {}
        for prefix, placement in adapter.placements:
            for inner, tensor in placement.owned().items():
                ours = first.setdefault(id(tensor), f"{prefix}.{inner}")
                self._owned[ours] = tensor
                if isinstance(placement, (Train, BatchStats)):
                    self._copies[_join(placement.home, inner)] = ours
                elif placement.slot != HEAD_SLOT:
                    self._homes.append((placement.home, placement.slot, prefix, inner, ours))

    def tensors(self) -> dict[str, Tensor]:
        """Our name -> the tensor that acts."""
        backbone = {f"{BACKBONE}.{k}": t for k, t in self._backbone.items() if k not in self._copies}
        return {name: t for name, t in (backbone | self._owned).items() if not is_derived(name)}

    def names(self, key: str) -> tuple[str, Place] | None:
        """Our name of an official key and its place; None where it may be dropped.

        Raises:
            OfficialError: The key is unknown, or what it names is not there.
        """
        if is_derived(key) or self.system.is_dead(key):
            return None
        try:
            place = self.system.place(key)
        except UnknownKeyError:
            raise OfficialError(f"{self.system.name}: unknown key {key!r}; it belongs to another system") from None
        return None if place is None else (self._name(key, place), place)

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official names and layouts -> ours.

        Raises:
            OfficialError: An unknown key, a shape that does not fit, or a part of a tensor that is missing.
        """
        ours = self.tensors()
        converted: dict[str, Tensor] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        for key, tensor in tensors.items():
            found = self.names(key)
            if found is None:
                continue
            name, place = found
            if name not in ours:
                raise OfficialError(f"{self.system.name}: {key!r} has no place: there is no tensor {name!r}")
            value = tensor if place.change is None else place.change(tensor)
            if place.part is None:
                converted[name] = same_layout(key, value, ours[name])
            else:
                parts.setdefault(name, {})[place.part[0]] = value
                number = place.part[1]
                if len(parts[name]) == number:
                    whole = torch.cat([parts[name][i] for i in range(number)])
                    converted[name] = same_layout(key, whole, ours[name])
        if incomplete := sorted(parts.keys() - converted.keys()):
            raise OfficialError(f"{self.system.name}: the state holds only a part of {incomplete[0]!r}")
        return converted

    def _name(self, key: str, place: Place) -> str:
        if place.owner == "head":
            return f"{HEAD_SLOT}.{place.name}"
        if place.owner == "backbone":
            path = _join(place.path, place.name)
            return self._copies.get(path, f"{BACKBONE}.{path}")
        fitting = [
            (home, ours)
            for home, slot, _, inner, ours in self._homes
            if inner == place.name and place.slot in (None, slot) and _inside(home, place.path)
        ]
        exact = {ours for home, ours in fitting if home == place.path}
        names = exact or {ours for _, ours in fitting}
        if len(names) != 1:
            raise OfficialError(
                f"{self.system.name}: {key!r} has {len(names)} places: {place.name!r} of the adapter at "
                f"{place.path or 'the model'!r} is {'nowhere' if not names else sorted(names)}"
            )
        return names.pop()


def same_layout(key: str, tensor: Tensor, ours: Tensor) -> Tensor:
    """Add or drop axes of length one (a scale per channel, a classifier kept as a 1x1 convolution).

    Raises:
        OfficialError: The shapes differ otherwise.
    """
    if [n for n in tensor.shape if n != 1] != [n for n in ours.shape if n != 1]:
        raise OfficialError(f"{key}: shape {tuple(tensor.shape)} does not fit ours, {tuple(ours.shape)}")
    return tensor.reshape(ours.shape)


def _inside(home: str, path: str) -> bool:
    return not path or home == path or home.startswith(f"{path}.")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
