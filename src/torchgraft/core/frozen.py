"""Frozen means frozen: gradients off, BatchNorm statistics kept, the backbone's dropout silent."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import GraftError, nearest
from ..swap import has_layer, swap, unswap
from .blocks import inner_modules
from .graft import RESERVED, recomputing
from .layers import is_batchnorm
from .placements.train import BatchStats

BATCHNORM_POLICIES = ("frozen", "adapt", "train")


class HeldInEval:
    """Keeps one module in eval mode under ``model.train()``, unless the active adapter trains it."""

    swap_rank = 5
    training: bool

    def train(self, mode: bool = True) -> nn.Module:
        """Pass the mode on to the children; follow it only where the active adapter asks for it."""
        super().train(mode)  # type: ignore[misc]
        self.__dict__["_wanted_mode"] = mode
        return self.settle()

    def settle(self) -> nn.Module:
        """Take the mode that the model's mode and the active adapter give this one module."""
        point = self._modules.get(RESERVED)  # type: ignore[attr-defined]
        follows = point is not None and any(isinstance(a, BatchStats) and a.mode == "train" for a in point.before)
        self.training = self.__dict__["_wanted_mode"] and follows
        return self  # type: ignore[return-value]


def hold(module: nn.Module) -> None:
    """Keep one module in eval mode from now on, and remember the mode it would have."""
    if not has_layer(module, HeldInEval):
        swap(module, HeldInEval)
        module.__dict__["_wanted_mode"] = module.training
    module.settle()  # type: ignore[operator]


def release(module: nn.Module) -> None:
    """Let a held module have the mode it would have; a no-op for others."""
    if has_layer(module, HeldInEval):
        unswap(module, HeldInEval)
        module.training = module.__dict__.pop("_wanted_mode")


def freeze(model: nn.Module) -> dict[str, bool]:
    """Switch gradients off and hold every BatchNorm in eval mode; for dropout see :func:`hold_silent`.

    Returns:
        ``requires_grad`` of every parameter as it was, by name.
    """
    before = {n: p.requires_grad for n, p in model.named_parameters() if RESERVED not in n.split(".")}
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.requires_grad_(False)
    for _, module in inner_modules(model):
        if is_batchnorm(module):
            hold(module)
    return before


def unfreeze(model: nn.Module, before: dict[str, bool]) -> None:
    """Undo :func:`freeze`: gradients as they were, held modules follow the model's mode again."""
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.requires_grad_(before[name])
    for _, module in inner_modules(model):
        release(module)
    _functional_rates(model, silent=False)


def hold_silent(model: nn.Module, dropout: bool) -> None:
    """Let the backbone's own dropout act in training (``dropout=True``) or keep it silent."""
    for _, module in inner_modules(model):
        if _drops(module) and not is_batchnorm(module):
            (release if dropout else hold)(module)
    _functional_rates(model, silent=not dropout)


class CountsOnce:
    """A BatchNorm of an adapter's own: the second forward of gradient checkpointing leaves its statistics alone."""

    training: bool
    _buffers: dict[str, Any]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; in a recomputed forward on copies of the statistics."""
        if not (self.training and recomputing()):
            return super().forward(x)  # type: ignore[misc]
        own = dict(self._buffers)
        self._buffers.update({n: None if b is None else b.clone() for n, b in own.items()})
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            self._buffers.update(own)


def count_once(placement: nn.Module) -> None:
    """Make every BatchNorm that belongs to ``placement`` count a batch once."""
    for module in placement.modules():
        if is_batchnorm(module):
            swap(module, CountsOnce)


def _functional_rates(model: nn.Module, *, silent: bool) -> None:
    """Dropout that a model applies by itself, by the rate in its attribute ``drop_rate`` (timm's classifiers)."""
    for module in model.modules():
        held = module.__dict__
        if silent and isinstance(held.get("drop_rate"), float) and "_own_drop_rate" not in held:
            held["_own_drop_rate"], held["drop_rate"] = held["drop_rate"], 0.0
        elif not silent and "_own_drop_rate" in held:
            held["drop_rate"] = held.pop("_own_drop_rate")


def batchnorm_placements(model: nn.Module, policy: str) -> list[BatchStats]:
    """The placements that give an adapter its own BatchNorm statistics; none for ``"frozen"``.

    Raises:
        GraftError: Unknown policy.
    """
    if policy not in BATCHNORM_POLICIES:
        raise GraftError(f"batchnorm={policy!r}: {nearest(policy, BATCHNORM_POLICIES)}")
    if policy == "frozen":
        return []
    return [
        BatchStats(path, module, policy)
        for path, module in inner_modules(model)
        if is_batchnorm(module) and module.track_running_stats and module.running_mean is not None
    ]


def _drops(module: nn.Module) -> bool:
    """Whether the module's own forward drops something in training mode.

    Dropout and stochastic depth are leaves with a rate. Attention modules often pass a rate to a functional
    kernel instead; those have a rate or a dropout child of their own. Modules that only hold such children
    keep their mode, since gradient checkpointing of some libraries depends on it.
    """
    name = type(module).__name__
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)):
        return True
    children = [c for n, c in module.named_children() if n != "torchgraft"]
    if not children:
        return "Drop" in name or "StochasticDepth" in name
    if "Attention" not in name or name.endswith("Layer"):
        return False
    rates = [v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]
    return bool(rates) or any(isinstance(c, nn.Dropout) for c in children)


def own_parameters(module: nn.Module) -> int:
    """Number of the module's own parameter values, whatever adapters are attached to it."""
    return sum(p.numel() for name, p in module.named_parameters() if RESERVED not in name.split("."))


def reference_tensor(model: nn.Module) -> torch.Tensor:
    """A floating-point parameter (or buffer) that tells the model's device and dtype."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0)
