"""Train and BatchStats: existing parameters and statistics that the adapter owns a copy of."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
        """The adapter's copy."""
        return self._parameters[f"own_{name}"]  # type: ignore[return-value]

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


class BatchStats(Placement):
    """The adapter's own running statistics of one BatchNorm.

    ``mode="train"`` is the behaviour of official training loops: batch statistics normalise while training
    and the running ones follow. ``mode="adapt"`` normalises with the running statistics, in training too,
    and lets them follow the task's batches first; no gradient flows through them.

    Args:
        home: Path of the BatchNorm.
        module: The BatchNorm; its statistics are copied.
        mode: ``"train"`` or ``"adapt"``.
    """

    kind: ClassVar[str] = "stats"
    functional: ClassVar[bool] = True

    def __init__(self, home: str, module: nn.Module, mode: str) -> None:
        super().__init__(home)
        assert isinstance(module, _BatchNorm)
        self.mode = mode
        self.momentum = module.momentum
        self.names = tuple(n for n in ("running_mean", "running_var", "num_batches_tracked") if n in module._buffers)
        for name in self.names:
            value = module._buffers[name]
            assert value is not None
            self.register_buffer(name, torch.empty_like(value, device="meta") if _planning() else value.clone())
        self._kept: list[Tensor] = []

    def hooks(self) -> list[Hook]:
        """A view per statistic, and the update."""
        views = [Hook(self.home, f"view:{name}", self) for name in self.names]
        return [Hook(self.home, "before", self), *views, Hook(self.home, "after", self)]

    def views(self) -> tuple[str, ...]:
        """The running statistics."""
        return self.names

    def view(self, name: str, value: Tensor) -> Tensor:
        """The adapter's copy."""
        return self._buffers[name]  # type: ignore[return-value]

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Follow the batch (``adapt``); remember the statistics when a forward is run a second time."""
        if self.training and self.mode == "adapt" and not recomputing():
            self._follow(first_tensor(args, kwargs).detach())
        if self.training and self.mode == "train" and recomputing():
            self._kept = [self._buffers[n].clone() for n in self.names]  # type: ignore[union-attr]
        return args, kwargs

    def after(self, args: Args, kwargs: Kwargs, out: Tensor) -> Tensor:
        """Undo the update that a recomputed forward made: one batch counts once."""
        if self._kept:
            for name, value in zip(self.names, self._kept, strict=True):
                self._buffers[name].copy_(value)  # type: ignore[union-attr]
            self._kept = []
        return out

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x.float(), dim=dims, unbiased=True)
        self.num_batches_tracked.add_(1)  # type: ignore[operator, union-attr]
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)  # type: ignore[operator, union-attr, arg-type]
        self.running_var.lerp_(var.to(self.running_var.dtype), rate)  # type: ignore[operator, union-attr, arg-type]


def _planning() -> bool:
    """Whether placements are being built on the meta device, to be counted and thrown away."""
    return torch.empty(0).device.type == "meta"
