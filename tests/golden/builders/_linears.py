"""Linear layers side by side with a change of the weight of each: the form ``linear`` of two systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import Placement
from torchgraft.official.base import Place, System, UnknownKeyError

from ..adapted import AdaptedNetwork
from ..case import Tensors


class Linears(nn.Module):
    """``layerJ`` maps the J-th input; inputs that are not given (the dry run guesses one) are zeros."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for j, (inputs, outputs) in enumerate(sizes):
            self.add_module(f"layer{j}", nn.Linear(inputs, outputs))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        layers: list[nn.Linear] = list(self.children())  # type: ignore[arg-type]
        space = given[0].shape[:-1]
        inputs = [*given, *(given[0].new_zeros(*space, layer.in_features) for layer in layers[len(given) :])]
        return tuple(layer(x) for layer, x in zip(layers, inputs, strict=True))


@dataclasses.dataclass(frozen=True)
class OnLinears(tg.Method):
    """What the builder places on each layer."""

    name: ClassVar[str] = "on-linears"
    place: Callable[[tg.Anatomy], list[Placement]]

    def placements(self, anatomy: tg.Anatomy) -> list[Placement]:
        return self.place(anatomy)


class LayerNames(System):
    """``layerJ.{weight,bias}`` of the host, ``layerJ.NAME`` of its form, and names that all layers share."""

    def __init__(self, model: nn.Module, own: Mapping[str, str], shared: Mapping[str, str]) -> None:
        super().__init__(model)
        self.own, self.shared = own, shared

    def method(self, state: Mapping[str, Tensor]) -> tg.Method:
        raise NotImplementedError("the builder says which method a case holds")

    def place(self, key: str) -> Place:
        path, _, name = key.rpartition(".")
        if key in self.shared:
            return Place("adapter", "", self.shared[key])
        if path not in dict(self.model.named_modules()) or not path:
            raise UnknownKeyError(key)
        return Place("adapter", path, self.own[name]) if name in self.own else Place("backbone", path, name)


class LinearsNetwork(AdaptedNetwork):
    """``xJ`` in, ``yJ`` out; the loss is the sum of their mean squares."""

    def run(self, inputs: Tensors) -> Tensors:
        outputs = self._model(*(inputs[f"x{j}"] for j in range(len(inputs))))
        return {f"y{j}": y for j, y in enumerate(outputs)}

    def loss(self, outputs: Tensors) -> Tensor:
        return sum((y.square().mean() for y in outputs.values()), start=next(iter(outputs.values())).new_zeros(()))
