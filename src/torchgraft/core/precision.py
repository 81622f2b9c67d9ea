"""Precision: the frozen backbone in a half type, what trains in float32.

A frozen weight gets no update that could be lost in rounding, so half the bytes serve: for the weights, and for every
activation that is kept. What trains is another matter: its values, gradients and optimiser state stay float32, and it
is rounded where it is used:

* the forms of an adapter read their parameters in the backbone's type, so that no tensor of the stream is promoted,
* scales and shifts of the stream stay float32 and are rounded after the product: near one, bfloat16 has steps of 0.8 %,
* a form's changed weight ``W + dW`` is rounded once, as a whole,
* the adapter's own head reads its features in float32, so that logits and loss are float32,
* BatchNorms keep float32: their kernels take half-precision input beside float32 statistics, on the CPU and on CUDA,
  so this costs four values per channel and no copy, while a rounded variance would scale whole channels wrongly.

No autocast is needed, and it would undo a part of the savings: on CUDA it runs norms and softmax in float32 and keeps
what they read in that type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import GraftError
from ..lean.hooks import acts
from ..lean.saved import derive
from ..swap import swap
from .adapter import Adapter, adapters, registry_of
from .anatomy import Anatomy
from .blocks import inner_modules
from .fingerprint import fingerprint, remember_rounding
from .head import HEAD_SLOT
from .layers import is_batchnorm
from .placements import Affine, BatchStats, Placement, Train

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that a frozen backbone can be cast to, by name."""


def cast_frozen(model: nn.Module, dtype: torch.dtype | str = torch.bfloat16) -> None:
    """Cast the frozen part of an adapted model; adapters, heads and BatchNorms are float32 afterwards.

    The model takes float32 inputs as before and, where its adapter has a head, returns float32 logits. Training loop,
    optimiser and saving need no change: gradients are float32, and the saved adapter belongs to the backbone as it was
    before the cast. The cast cannot be undone; build the backbone again for its float32 weights. float16 needs a loss
    scaler, as ever.

    Call it after :func:`torchgraft.attach` and before the optimiser is made; after attaching or loading a further
    adapter call it again.

    Args:
        model: A model with adapters.
        dtype: ``torch.bfloat16``, ``torch.float16``, ``"bf16"`` or ``"fp16"``.

    Raises:
        GraftError: Another type, no adapter, or an adapter that is merged into the weights.
    """
    kind = HALF.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None or kind not in HALF.values():
        raise GraftError(f"cast_frozen: dtype={dtype!r} was given, expected torch.bfloat16 or torch.float16")
    known = adapters(model)
    if not known:
        raise GraftError("cast_frozen: nothing is attached to the model, so nothing in it is frozen; attach first")
    if (merged := registry_of(model).merged) is not None:
        raise GraftError(f"cast_frozen: adapter {merged.name!r} is merged into the weights; unmerge first")
    example = next((a.example for a in known.values() if a.example is not None), None)
    anatomy = Anatomy(model, example=example)
    before = fingerprint(anatomy)
    _cast_backbone(model, kind)
    for adapter in known.values():
        _keep_precise(adapter, kind)
    model.__dict__["_takes"] = kind
    swap(model, TakesFloats)
    remember_rounding(anatomy, before)


class TakesFloats:
    """In front of a whole model: what comes in is cast to the type that the backbone computes in."""

    swap_rank = -4

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on cast inputs."""
        kind: torch.dtype = self.__dict__["_takes"]
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(kind) if t.is_floating_point() else t, (args, kwargs))
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class ReadsRounded:
    """In front of a module of a form: its parameters are kept in float32 and read in the backbone's type."""

    swap_rank = 6
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    def _view(self, name: str) -> Any:
        value = self._parameters[name] if name in self._parameters else self._buffers[name]
        kind: torch.dtype = self.__dict__["_reads"]
        if value is None or value.dtype == kind:
            return value
        rounded = value.to(kind)
        if not torch.compiler.is_compiling() and acts(value):
            derive(rounded, lambda v: v.to(kind), value)  # the parameter is there anyway: a copy need not be kept
        return rounded


class ReadsPrecise:
    """In front of a head: what it reads is brought to float32 first."""

    swap_rank = 6

    def forward(self, x: Tensor) -> Any:
        """The head on float32 features."""
        return super().forward(x.float())  # type: ignore[misc]


def _cast_backbone(model: nn.Module, kind: torch.dtype) -> None:
    own = {id(p) for adapter in adapters(model).values() for p in adapter.parameters()}
    for module in (model, *(inner for _, inner in inner_modules(model))):
        if is_batchnorm(module):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point() and id(parameter) not in own:
                parameter.data = parameter.data.to(kind)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(kind)


def _keep_precise(adapter: Adapter, kind: torch.dtype) -> None:
    """Bring what an adapter owns to float32 and let its forms read it in ``kind``."""
    for _, placement in adapter.placements:
        placement.float()
        if placement.slot == HEAD_SLOT:
            swap(placement.form, ReadsPrecise)  # type: ignore[arg-type]
        elif isinstance(placement, Affine):
            # Acting through the parameters it may stand in for a bias that is not there, and has that bias's type then.
            if placement.through is not None and not is_batchnorm(adapter.model.get_submodule(placement.home)):
                _read_rounded(placement, ("shift",), kind)
        elif not isinstance(placement, (Train, BatchStats)):
            for module in placement.modules():
                _read_rounded(module, _floats(module), kind)


def _floats(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module of a form holds in a floating type and reads in the backbone's."""
    if is_batchnorm(module):
        return ()
    held = {**module._parameters, **module._buffers}
    precise = getattr(module, "precise", ())
    return tuple(n for n, t in held.items() if t is not None and t.is_floating_point() and n not in precise)


def _read_rounded(module: nn.Module | Placement, names: tuple[str, ...], kind: torch.dtype) -> None:
    if names:
        module.__dict__["_reads"] = kind
        swap(module, ReadsRounded, names)
