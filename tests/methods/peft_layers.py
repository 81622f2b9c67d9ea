"""Single layers under an adapter of ours and under peft's with the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import torchgraft as tg

from ..core.attaching import assert_close, disturb

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 12), (3, 5, 6)),
    "conv": (lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1), (3, 6, 9, 8)),
    "1x1 conv": (lambda: nn.Conv2d(6, 12, 1), (3, 6, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 12, 3), (3, 6, 9)),
}


class Host(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        return self.layer(x)


def assert_same_as_peft(
    kind: str, method: tg.Method, config: peft.PeftConfig, prefix: str, gradients: bool = True
) -> None:
    """Outputs (and gradients) of both, on one layer; peft's tensors are named as ours behind ``prefix``."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    ours, theirs, x = Host(make()), Host(make()), torch.randn(shape)
    theirs.load_state_dict(ours.state_dict())
    reference = peft.get_peft_model(theirs, config)
    adapter = disturb(tg.attach(ours, method, include="layer", example=((x,), {})))
    form, held = adapter.placements[0][1].form, reference.base_model.model.layer
    pairs = [(p, getattr(held, prefix + name)["default"]) for name, p in form.named_parameters()]
    assert len(pairs) == sum(p.requires_grad for p in reference.parameters())
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.view_as(other))
    assert_close(ours(x), reference(x))
    if not gradients:
        return
    weight = torch.randn_like(ours(x))
    (ours(x) * weight).sum().backward()
    (reference(x) * weight).sum().backward()
    for mine, other in pairs:
        assert_close(mine.grad, other.grad.view_as(mine), 1e-4)
