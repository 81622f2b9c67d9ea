"""Train and BatchStats: existing parameters and statistics that the adapter owns a copy of."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import GraftError
from ...swap import original_class
from ..graft import Args, Kwargs, first_tensor, recomputing
from .base import Hook, Placement, Support


class Train(Placement):
    """The adapter's own, trainable copy of some parameters of a module.

    Reading ``module.weight`` returns the copy while the adapter is active; the backbone's parameter stays
    as it was, bit for bit, and other adapters keep reading it.

    Args:
        home: Path of the module.
        parameters: Name -> current value; each is copied.
    """

    kind: ClassVar[str] = "train"
    functional: ClassVar[bool] = True

    def __init__(self, home: str, parameters: dict[str, Tensor], *, slot: str | None = None) -> None:
        super().__init__(home, slot or "trained")
        self.names = tuple(parameters)
        for name, value in parameters.items():
            copy = torch.empty_like(value, device="meta") if _planning() else value.detach().clone()
            self.register_parameter(f"own_{name}", nn.Parameter(copy))

    def give_up(self, names: list[str]) -> None:
        """Own these parameters no longer (another placement of the adapter does)."""
        for name in names:
            del self._parameters[f"own_{name}"]
        self.names = tuple(n for n in self.names if n not in names)

    def hooks(self) -> list[Hook]:
        """One view per parameter."""
        return [Hook(self.home, f"view:{name}", self) for name in self.names]

    def views(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return self.names

    def view(self, name: str, value: Tensor) -> Tensor:
        """The adapter's copy, in the type of what it stands for."""
        return self._parameters[f"own_{name}"].to(value.dtype)  # type: ignore[union-attr]

    def owned(self) -> dict[str, Tensor]:
        """The copies under the names of the originals."""
        return {name: self._parameters[f"own_{name}"] for name in self.names}  # type: ignore[misc]

    def folded(self, module: nn.Module) -> dict[str, Tensor]:
        """The copies themselves."""
        return {name: self._parameters[f"own_{name}"].float() for name in self.names}  # type: ignore[union-attr]

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """Every module that reads its parameters as attributes."""
        if isinstance(module, nn.RNNBase):
            return Support(False, False, "recurrent layers keep a flat copy of their weights")
        return Support(True, True)

    def supports_here(self, module: nn.Module) -> Support:
        """As :meth:`supports`, and the module must hold the parameters itself."""
        computed = next((n for n in self.names if module._parameters.get(n) is None), None)
        if computed is not None:
            name = original_class(module).__name__
            return Support(False, False, f"{name} holds no parameter {computed!r}; train those it is computed from")
        return type(self).supports(module)


class BatchStats(Placement):
    """The adapter's own running statistics of one BatchNorm.

    ``mode="train"`` is the behaviour of official training loops: batch statistics normalise while training
    and the running ones follow. ``mode="adapt"`` normalises with the running statistics, in training too,
    and lets them follow the task's batches first; no gradient flows through them. Under gradient
    checkpointing a batch counts once, in the first of its two forwards.

    Args:
        home: Path of the BatchNorm.
        module: The BatchNorm; its statistics are copied.
        mode: ``"train"`` or ``"adapt"``.

    Raises:
        GraftError: ``module`` is no BatchNorm with running statistics.
    """

    kind: ClassVar[str] = "stats"
    functional: ClassVar[bool] = True

    def __init__(self, home: str, module: nn.Module, mode: str) -> None:
        super().__init__(home)
        support = self.supports(module)
        if not support.forward:
            raise GraftError(f"stats at {home!r}: {support.reason}; expected a BatchNorm with running statistics")
        self.mode = mode
        self.momentum: float | None = module.momentum  # type: ignore[assignment]
        held = {n: module._buffers.get(n) for n in ("running_mean", "running_var", "num_batches_tracked")}
        self.names = tuple(n for n, value in held.items() if value is not None)
        for name in self.names:
            value: Tensor = held[name]  # type: ignore[assignment]
            self.register_buffer(name, torch.empty_like(value, device="meta") if _planning() else value.clone())

    def hooks(self) -> list[Hook]:
        """The update, and a view per statistic."""
        return [Hook(self.home, "before", self), *(Hook(self.home, f"view:{name}", self) for name in self.names)]

    def views(self) -> tuple[str, ...]:
        """The running statistics."""
        return self.names

    def view(self, name: str, value: Tensor) -> Tensor:
        """The adapter's copy, or a copy of that where writing to it, or a later update of it, would do harm."""
        own: Tensor = self._buffers[name]  # type: ignore[assignment]
        # adapt: autograd keeps what normalised this batch, and the next forward changes the statistics in place.
        # train: BatchNorm updates what it reads, but a batch that is only recomputed was counted before.
        return own.clone() if self.training and (self.mode == "adapt" or recomputing()) else own

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Follow the batch (``adapt``), unless this forward is the second one of a checkpointed piece."""
        if self.training and self.mode == "adapt" and not recomputing():
            self._follow(first_tensor(args, kwargs).detach())
        return args, kwargs

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        """BatchNorms that keep running statistics."""
        name = original_class(module).__name__
        if not isinstance(module, _BatchNorm):
            return Support(False, False, f"{name} is no BatchNorm")
        if module._buffers.get("running_mean") is None or module._buffers.get("running_var") is None:
            return Support(False, False, f"this {name} keeps no running statistics")
        return Support(True, False, "the backbone keeps its own statistics for other adapters")

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        mean: Tensor = self._buffers["running_mean"]  # type: ignore[assignment]
        var: Tensor = self._buffers["running_var"]  # type: ignore[assignment]
        tracked = self._buffers.get("num_batches_tracked")
        if tracked is not None:
            tracked.add_(1)
        rate = self.momentum
        if rate is None:
            rate = 0.0 if tracked is None else 1.0 / float(tracked)
        dims = [d for d in range(x.dim()) if d != 1]
        mean.lerp_(x.float().mean(dims).to(mean.dtype), rate)
        if x.numel() > x.shape[1]:  # one value per channel has no variance
            var.lerp_(x.float().var(dims).to(var.dtype), rate)


def _planning() -> bool:
    """Whether placements are being built on the meta device, to be counted and thrown away."""
    return torch.empty(0).device.type == "meta"
