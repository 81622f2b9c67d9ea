"""Several small modules of ours side by side: the form ``modules`` of the golden cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from torchgraft.official.base import is_derived

from .case import GoldenCase, StateError, Tensors


class ModulesCase(GoldenCase):
    """One input and one output per module, and ``concat``: all outputs flattened, in the order of the names.

    Args:
        modules: Name -> module of ours; all of their parameters train.
        rename: Official key inside a module -> our key inside it.
    """

    def __init__(self, modules: Mapping[str, nn.Module], rename: Callable[[str], str]) -> None:
        self._modules, self._rename = nn.ModuleDict(modules).eval(), rename

    def name_of(self, key: str) -> str | None:
        module, _, inner = key.partition(".")
        if module not in self._modules:
            raise StateError(f"official key {key!r} belongs to no module of the case")
        return None if is_derived(key) else f"{module}.{self._rename(inner)}"

    def state(self) -> Tensors:
        return {k: v for k, v in self._modules.state_dict(keep_vars=True).items() if not is_derived(k)}

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._modules.named_parameters())

    def adapter_parameters(self) -> set[str]:
        return set(self.parameters())

    def frozen(self) -> Tensors:
        return {}

    def train(self, mode: bool) -> None:
        self._modules.train(mode)

    def run(self, inputs: Tensors) -> Tensors:
        outputs = {name: module(inputs[name]) for name, module in self._modules.items()}
        return {**outputs, "concat": torch.cat([outputs[n].flatten() for n in sorted(outputs)])}

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["concat"].square().mean()
