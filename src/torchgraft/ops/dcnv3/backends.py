"""What computes DCNv3: kernels behind the registered operator, and forms made of other operators.

=============  =============================================================================================
``native``     C++ kernel, compiled on first use; the default on CPUs
``triton``     Triton kernel; the default on CUDA
``torch``      PyTorch, one point after the other; the default elsewhere and where no kernel can be had
``reference``  PyTorch, differentiable any number of times; keeps every sample
``grid_sample``  one ``grid_sample``, for exchange formats; keeps every sample
``torchvision``  ``torchvision.ops.deform_conv2d``, to compare with
=============  =============================================================================================
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from ...errors import GraftError, nearest
from . import frugal, native, reference
from .geometry import Geometry

Form = Callable[[Tensor, Tensor, Tensor, Geometry, bool], Tensor]

KERNELS = ("native", "triton", "torch")
"""Backends of the registered operator."""

FORMS = ("reference", "grid_sample", "torchvision")
"""Backends that PyTorch sees as the operators they are made of."""


class Kernel(Protocol):
    """A module that computes the operator and its gradients."""

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool, /) -> Tensor:
        """See :func:`.frugal.forward`."""

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        offset: Tensor,
        mask: Tensor,
        geometry: Geometry,
        softmax: bool,
        wanted: Sequence[bool],
        /,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See :func:`.frugal.backward`."""


_chosen: str | None = os.environ.get("TORCHGRAFT_OPS_BACKEND") or None


def set_backend(name: str | None) -> None:
    """Choose what computes the operators of this package; the variable TORCHGRAFT_OPS_BACKEND does so from outside.

    Args:
        name: One of ``KERNELS`` or ``FORMS``; None for the best that runs where the tensors are.

    Raises:
        GraftError: There is no such backend.
    """
    global _chosen
    _chosen = _known(name) if name else None


def backend_in_use(device: str | torch.device = "cpu") -> str:
    """The backend that tensors on this device meet when a call names none; may compile the C++ kernel to find out.

    Raises:
        GraftError: The chosen backend does not run there.
    """
    kind = torch.device(device).type
    return form_in_use(None) or _kernel_name(kind, None)


def describe() -> list[tuple[str, Literal["ok", "absent"], str]]:
    """What there is on this machine: name, state and a few words for each kernel; compiles nothing."""
    found: list[tuple[str, Literal["ok", "absent"], str]] = []
    there, words = native.state()
    found.append(("dcnv3 on CPUs", "ok" if there else "absent", words if there else f"slower PyTorch code: {words}"))
    if torch.cuda.is_available():
        words = "Triton kernel" if _has_triton() else "slower PyTorch code: triton is not installed"
        found.append(("dcnv3 on CUDA", "ok" if _has_triton() else "absent", words))
    if _chosen:
        found.append(("dcnv3 backend", "ok", f"{_chosen}, by set_backend or TORCHGRAFT_OPS_BACKEND"))
    return found


def form_in_use(backend: str | None) -> str | None:
    """The form that a call with this argument meets; None if a kernel.

    Raises:
        GraftError: There is no such backend.
    """
    name = backend or _chosen
    return name if name and _known(name) in FORMS else None


def form(name: str) -> Form:
    """One of ``FORMS``."""
    if name == "reference":
        return reference.dcnv3
    from . import forms  # torchvision's operators are not loaded for nothing

    return forms.grid_sample if name == "grid_sample" else forms.torchvision_op


def kernel(device: str, backend: str | None) -> Kernel:
    """The kernel for tensors on a type of device, ``cpu`` or ``cuda``.

    Raises:
        GraftError: The one that was asked for does not run there.
    """
    name = _kernel_name(device, backend)
    if name == "triton":
        from . import triton_kernel  # Triton is not everywhere

        return cast(Kernel, triton_kernel)
    return cast(Kernel, native if name == "native" else frugal)


def _kernel_name(device: str, backend: str | None) -> str:
    name = backend or _chosen
    if not name:
        if device == "cpu" and native.available():
            return "native"
        return "triton" if device == "cuda" and _has_triton() else "torch"
    if _known(name) in FORMS:
        raise GraftError(
            f"dcnv3: {name} is no kernel of torch.ops.torchgraft.dcnv3, which runs {', '.join(KERNELS)}; "
            f"torchgraft.ops.dcnv3 runs it, outside of TorchScript"
        )
    if name == "native":
        if device != "cpu":
            raise GraftError(f"dcnv3: backend native runs on cpu, the tensors are on {device}")
        try:
            native.load()
        except native.Unavailable as reason:
            raise GraftError(f"dcnv3: backend native does not run here: {reason}") from reason
    if name == "triton":
        if not _has_triton():
            raise GraftError("dcnv3: backend triton is not installed; pip install triton")
        if device != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            raise GraftError(f"dcnv3: backend triton runs on cuda, the tensors are on {device}")
    return name


def _has_triton() -> bool:
    return "triton" in sys.modules or importlib.util.find_spec("triton") is not None


def _known(name: str) -> str:
    if name not in KERNELS and name not in FORMS:
        raise GraftError(f"there is no backend {name!r}; {nearest(name, (*KERNELS, *FORMS))}")
    return name
