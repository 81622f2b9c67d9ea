"""Hand-built placements on toy models, and what must hold for every one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.anatomy import Anatomy
from torchgraft.core.placements import Placement

Make = Callable[[Anatomy], "Placement | list[Placement]"]


@dataclasses.dataclass(frozen=True)
class Placed(tg.Method):
    """A method that asks for whatever ``make`` returns."""

    name: ClassVar[str] = "placed"
    make: Make

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        made = self.make(anatomy)
        return [made] if isinstance(made, Placement) else made


def attach(model: nn.Module, make: Make, *inputs: Tensor, **options: Any) -> tg.Adapter:
    """Attach what ``make`` returns; ``inputs`` are the dry run's."""
    return tg.attach(model, Placed(make), example=(inputs, {}) if inputs else None, **options)


def disturb(adapter: tg.Adapter, scale: float = 0.3, seed: int = 0) -> tg.Adapter:
    """Move every trainable tensor away from where it starts, so that nothing is an identity by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return adapter


def run(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The first tensor that the model returns in inference."""
    with torch.no_grad():
        return first(model(*inputs))


def first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance`` times the largest value that is wanted; and not trivially so."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert wanted.abs().max() > 1e-3
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance, f"relative error {float(error):.2e}"


def assert_every_tensor_learns(adapter: tg.Adapter, *inputs: Tensor) -> None:
    """One backward reaches every trainable tensor of the adapter, and nothing of the backbone."""
    model = adapter.model
    own = {id(p) for p in adapter.parameters()}
    model.zero_grad()
    torch.manual_seed(1)
    with torch.enable_grad():
        out = first(model(*inputs))
        (out * torch.randn_like(out)).sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert parameter.grad.abs().max() > 0, f"{name} gets the gradient zero"
    assert [n for n, p in model.named_parameters() if id(p) not in own and p.grad is not None] == []
    model.zero_grad()


class Remembered:
    """What a model is and does, to see that detaching brings it back: objects, classes, keys, bits, output."""

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        self.model, self.inputs = model, inputs
        self.seen = self._look()
        self.output = run(model, *inputs) if inputs else None

    def assert_same(self) -> None:
        """The model is what it was."""
        now = self._look()
        for what, then in self.seen.items():
            assert now[what] == then, what
        if self.output is not None:
            assert torch.equal(run(self.model, *self.inputs), self.output)

    def _look(self) -> dict[str, Any]:
        modules = dict(self.model.named_modules())
        return {
            "modules": {path: id(m) for path, m in modules.items()},
            "classes": {path: type(m) for path, m in modules.items()},
            "attributes": {path: sorted(vars(m)) for path, m in modules.items()},
            "modes": {path: m.training for path, m in modules.items()},
            "parameters": {n: (id(p), p.requires_grad) for n, p in self.model.named_parameters()},
            "bits": {k: (v.dtype, v.shape, v.numpy(force=True).tobytes()) for k, v in self.model.state_dict().items()},
        }
