"""Cells: one registered method on one family of backbones, and the cells that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg

from .. import traits
from .families import CLASSES, FAMILIES, logits, network

SPECS: dict[str, str] = traits.of("spec")
"""Methods whose defaults do not fit the small images of these tests."""

MOVED_START: dict[str, str] = traits.of("moved_start")
"""Methods that do not start as the pretrained network, and the documented start they have instead."""

REFUSED: dict[str, dict[str, str]] = traits.of("refused")
"""Method -> family -> what the refusal says. A refusal that is not listed is a failure."""

CORE = (
    "test_resnet",
    "resnetv2",
    "nfnet",
    "densenet",
    "convnext",
    "tf_efficientnetv2",
    "vit",
    "deit_distilled",
    "swin",
    "beit",
    "maxvit",
    "torchvision_vit",
    "hf_swin",
    "hf_t5",
)
"""Families that every run covers with the methods of DEEP; between them they have every kind of layer."""

COMMON = ("test_resnet", "convnext", "tf_efficientnetv2", "vit", "swin", "hf_bert")
"""Families that every run covers with every method."""

EVERYWHERE = ("conv-adapter", "full")
"""Methods that every run covers on every family: one of branches, one of copies."""

DEEP = ("lora", "ssf", "bitfit", "repnet")
"""Methods that every run covers on CORE: changed weights, affines, copies, taps. The rest is marked slow."""


def _cell(method: str, family: str) -> Any:
    often = family in COMMON or (family in CORE and method in DEEP) or method in EVERYWHERE
    return pytest.param((method, family), id=f"{method}-{family}", marks=() if often else pytest.mark.slow)


CELLS = [_cell(m, f) for m in tg.methods() for f in FAMILIES if f not in REFUSED.get(m, {})]
REFUSALS = [(m, f) for m, families in REFUSED.items() for f in families]


Gradients = dict[str, Tensor | None]


class Cell:
    """A method attached to a family's network, moved away from its start.

    Attributes:
        model: The adapted network.
        adapter: The adapter, with a head of its own where the family has a classifier.
        batch: Images or ids.
    """

    def __init__(self, method: str, family: str) -> None:
        self.method, self.family = method, family
        self.batch = FAMILIES[family].batch()
        self.model = network(family)
        self.adapter = disturb(self.attach(self.model))

    def attach(self, model: nn.Module, name: str = "default", *, head: bool = True) -> tg.Adapter:
        """The cell's method on ``model``."""
        classes = CLASSES if head and FAMILIES[self.family].classifier else None
        return attach(model, self.method, name=name, num_classes=classes)

    def gradients(self, model: nn.Module | None = None) -> Gradients:
        """Gradient of every trainable tensor after one forward and backward in the mode the model is in."""
        model = self.model if model is None else model
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
        loss(logits(model, self.batch)).backward()
        found = {n: p.grad for n, p in trainable.items()}
        model.zero_grad(set_to_none=True)
        return found


def disturb(adapter: tg.Adapter, seed: int = 0) -> tg.Adapter:
    """Move every trainable tensor away from its start, so that nothing is an identity by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            size = float(parameter.abs().mean()) or 1.0
            parameter.add_(0.2 * size * torch.randn(parameter.shape, generator=generator))
    return adapter


def attach(model: nn.Module, method: str, **options: Any) -> tg.Adapter:
    """``tg.attach`` with options that fit the small images of these tests."""
    return tg.attach(model, SPECS.get(method, method), **options)


def loss(out: Tensor) -> Tensor:
    """A scalar in which every output has its own weight."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return (out.float() * weights).sum()


def assert_same_gradients(found: Gradients, wanted: Gradients, tolerance: float = 1e-4) -> None:
    """Equal within ``tolerance`` of each tensor's largest value, or of a thousandth of the largest of all."""
    assert list(found) == list(wanted)
    floor = 1e-3 * max(float(g.abs().max()) for g in wanted.values() if g is not None)
    for name, grad in wanted.items():
        other = found[name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None:
            error = float((grad - other).abs().max()) / max(float(grad.abs().max()), floor)
            assert error <= tolerance, f"{name}: relative error {error:.2e}"


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Equal within ``tolerance`` times the largest value that is wanted; and not trivially so."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert wanted.abs().max() > 1e-3
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    assert error <= tolerance, f"relative error {error:.2e}"
