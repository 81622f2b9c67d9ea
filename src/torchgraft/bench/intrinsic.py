"""The local intrinsic dimension of a module: how many random directions are enough to train it (arXiv 2203.16329).

A module's parameters theta (D numbers) move in a random subspace of d directions, all others are frozen:

    theta = theta_0 + P z        z (d,) trained, P (D, d) fixed, with columns of unit norm on average

Its local intrinsic dimension is the smallest d that reaches 90 % of what training all of theta reaches. KAdaptation
picks the modules to adapt by it. P is structured (Fastfood: signs, Hadamard, permutation, Gaussian, Hadamard), so
that it takes 3 D numbers instead of D d.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import attach, detach
from ..core.anatomy import Anatomy
from ..core.method import Method, method
from ..core.placements import Hook, Placement, Support
from ..core.probe import Example, in_eval_mode
from ..errors import GraftError

Batches = Iterable[tuple[Any, Tensor]]
Measure = Callable[[Tensor, Tensor], Tensor]
_NAME = "intrinsic-dimension"


@dataclasses.dataclass(frozen=True)
class IntrinsicDimension:
    """What was measured.

    Attributes:
        dimension: The smallest d that is good enough; None when none is.
        reference: Score of training the whole module.
        scores: Score of every d that was tried; the sweep ends at the first that is good enough.
    """

    dimension: int | None
    reference: float
    scores: dict[int, float]


def accuracy(out: Tensor, target: Tensor) -> Tensor:
    """Which rows are classified right: 0 or 1 per row."""
    return (out.argmax(1) == target).float()


def intrinsic_dimension(
    model: nn.Module,
    site: str,
    data: tuple[Batches, Batches],
    ds: Sequence[int],
    *,
    ratio: float = 0.9,
    num_classes: int | None = None,
    steps: int = 300,
    lr: float = 0.01,
    seed: int = 0,
    loss: Measure = F.cross_entropy,
    score: Measure = accuracy,
    example: Example | None = None,
) -> IntrinsicDimension:
    """The local intrinsic dimension of the module at ``site``; the model is left as it was.

    Args:
        model: The backbone, without an adapter that is merged.
        site: Path or address of the module, such as ``blocks.3.attn``.
        data: Training and test batches ``(input, target)``; both are iterated over again and again.
        ds: Dimensions to try, in rising order.
        ratio: How much of the score of training the whole module is good enough.
        num_classes: Train a new head of this size along with the module; None: use the model's output.
        steps: Optimiser steps (Adam) of every run, the reference included.
        lr: Learning rate.
        seed: Of the subspaces and of the start of the head.
        loss: ``(output, target) -> scalar``.
        score: ``(output, target) -> one number per row``; higher is better, and the mean counts.
        example: Input ``(args, kwargs)`` of the dry run, for models whose input cannot be guessed.

    Raises:
        GraftError: No such module, one without parameters, ``ds`` that does not rise from at least 1, or a module
            whose full training reaches nothing.
    """
    if not ds or ds[0] < 1 or list(ds) != sorted(set(ds)):
        raise GraftError(f"intrinsic_dimension: ds={list(ds)}; expected rising whole numbers of at least 1")
    path = _path(Anatomy(model, example=example), site)

    def run(chosen: Method) -> float:
        torch.manual_seed(seed)
        adapter = attach(model, chosen, name=_NAME, include=path, num_classes=num_classes, lean=False, example=example)
        try:
            with in_eval_mode(model):
                _train(model, list(adapter.parameters()), data[0], steps, lr, loss)
                return _score(model, data[1], score)
        finally:
            detach(model, _NAME)

    with torch.random.fork_rng():
        reference = run(method("full"))
        if not reference > 0:
            raise GraftError(
                f"intrinsic_dimension: training all of {site!r} reaches a score of {reference:g} in {steps} steps, of "
                "which no part can be taken; give more steps=, another lr=, or a score= that is above 0"
            )
        scores: dict[int, float] = {}
        for d in ds:
            scores[d] = run(InSubspace(path, d, seed))
            if scores[d] >= ratio * reference:
                return IntrinsicDimension(d, reference, scores)
    return IntrinsicDimension(None, reference, scores)


@dataclasses.dataclass(frozen=True)
class InSubspace(Method):
    """All parameters of one module, moved together in a random subspace.

    Attributes:
        site: Path of the module.
        d: Dimension of the subspace.
        seed: Of the subspace.
    """

    name: ClassVar[str] = "in-subspace"
    site: str
    d: int
    seed: int = 0

    def placements(self, anatomy: Anatomy) -> list[Placement]:
        """One placement per module inside that holds parameters; they share z."""
        root = anatomy.module(self.site)
        holders = {
            path: {n: p for n, p in anatomy.module(path)._parameters.items() if p is not None and p.is_floating_point()}
            for path in (self.site, *(p for p in anatomy.modules if p.startswith(f"{self.site}.")))
        }
        total = sum(p.numel() for held in holders.values() for p in held.values())
        if total == 0:
            raise GraftError(f"{self.name}: {self.site!r} ({type(root).__name__}) holds no parameters")
        z = nn.Parameter(torch.zeros(self.d))
        generator = torch.Generator().manual_seed(self.seed)
        return [
            _Moved(path, {n: Fastfood(p.shape, z, total, generator) for n, p in held.items()})
            for path, held in holders.items()
            if held
        ]


class Fastfood(nn.Module):
    """The part of P z that belongs to one parameter.

    Args:
        shape: Shape of the parameter.
        z: (d,), shared.
        total: D, the number of parameters that move.
        generator: Where the random numbers come from.
    """

    signs: Tensor
    order: Tensor
    gauss: Tensor

    def __init__(self, shape: Sequence[int], z: nn.Parameter, total: int, generator: torch.Generator) -> None:
        super().__init__()
        self.z, self.shape = z, tuple(shape)
        size, self.n = torch.Size(shape).numel(), 1 << (z.numel() - 1).bit_length()
        self.factor = (self.n / total) ** 0.5
        blocks = -(-size // self.n)
        uniform = torch.rand(blocks, self.n, generator=generator, device="cpu")
        signs = torch.randint(0, 2, (blocks, self.n), generator=generator, device="cpu") * 2.0 - 1.0
        gauss = torch.randn(blocks, self.n, generator=generator, device="cpu")
        for name, value in (("signs", signs), ("order", uniform.argsort(1)), ("gauss", gauss)):
            self.register_buffer(name, value, persistent=False)

    def forward(self) -> Tensor:
        """P z, in the shape of the parameter."""
        x = hadamard(self.signs * F.pad(self.z, (0, self.n - self.z.numel())))
        x = hadamard(self.gauss * x.gather(1, self.order))
        return self.factor * x.flatten()[: torch.Size(self.shape).numel()].view(self.shape)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last axis, whose length is a power of two."""
    n, half = x.shape[-1], 1
    while half < n:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return x * n**-0.5


class _Moved(Placement):
    """Every parameter of a module reads as itself plus its part of P z."""

    kind: ClassVar[str] = "subspace"
    functional: ClassVar[bool] = True

    def __init__(self, home: str, parts: dict[str, nn.Module]) -> None:
        super().__init__(home)
        self.parts = nn.ModuleDict(parts)

    def hooks(self) -> list[Hook]:
        return [Hook(self.home, f"view:{name}", self) for name in self.parts]

    def views(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def view(self, name: str, value: Tensor) -> Tensor:
        return value + self.parts[name]()

    @classmethod
    def supports(cls, module: nn.Module) -> Support:
        return Support(not isinstance(module, nn.RNNBase), False, "it is for measuring")


def _path(anatomy: Anatomy, site: str) -> str:
    return site if site in anatomy.modules else anatomy.path(site)


def _train(
    model: nn.Module, parameters: list[nn.Parameter], batches: Batches, steps: int, lr: float, loss: Measure
) -> None:
    optimizer = torch.optim.Adam(parameters, lr=lr)
    done = 0
    while done < steps:
        before = done
        for x, target in itertools.islice(batches, steps - done):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
            done += 1
        if done == before:
            raise GraftError("intrinsic_dimension: the training batches are empty, or can be iterated over only once")


@torch.no_grad()
def _score(model: nn.Module, batches: Batches, score: Measure) -> float:
    found = [score(model(x), target).flatten() for x, target in batches]
    if not found:
        raise GraftError("intrinsic_dimension: the test batches are empty, or can be iterated over only once")
    return float(torch.cat(found).mean())
