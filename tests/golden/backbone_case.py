"""A whole backbone, or a part of one, whose every parameter trains: the cases of the architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from torchgraft.official.base import is_derived

from .adapted import watching
from .case import GoldenCase, Tensors


class BackboneCase(GoldenCase):
    """One model of ours; the loss is the mean square of ``logits`` unless a subclass says otherwise.

    Args:
        model: The model; our names are those of its state dict.
        rename: Official key -> our key, or None when the converter drops it.
        outputs: Name of an output -> path of the module that returns it, besides what ``forward`` gives.
        dead: Whether the official module owns a tensor and never uses it.
        optional: Outputs that a case of the form need not hold.
    """

    def __init__(
        self,
        model: nn.Module,
        rename: Callable[[str], str | None],
        outputs: Mapping[str, str] | None = None,
        dead: Callable[[str], bool] = lambda key: False,
        optional: Iterable[str] = (),
    ) -> None:
        self.model, self._rename = model.eval(), rename
        self._outputs, self._dead = dict(outputs or {}), dead
        self.optional = frozenset(optional)

    def name_of(self, key: str) -> str | None:
        return None if is_derived(key) or self._dead(key) else self._rename(key)

    def is_dead(self, key: str) -> bool:
        return self._dead(key)

    def state(self) -> Tensors:
        return {k: v for k, v in self.model.state_dict(keep_vars=True).items() if not is_derived(k)}

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def adapter_parameters(self) -> set[str]:
        return set(self.parameters())

    def frozen(self) -> Tensors:
        return {}

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        seen: Tensors = {}
        with watching(self.model, self._outputs, seen):
            returned = self.forward(inputs)
        return {**seen, **returned}

    def forward(self, inputs: Tensors) -> Tensors:
        """What the model itself returns, by the names of the case."""
        return {"logits": self.model(inputs["image"])}

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["logits"].square().mean()
