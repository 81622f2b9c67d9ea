"""DCNv3 by the C++ kernel of ``dcnv3.cpp``, compiled on first use with the machine's own compiler.

The file has a plain C interface and is called through ctypes: one compiler call of a few seconds, without PyTorch's
headers and without ninja. The library is kept among PyTorch's extensions (``TORCH_EXTENSIONS_DIR``, by default
``~/.cache/torch_extensions``) under a key of the source, the flags, the processor's features and the version of torch.
It appears there in one step, and processes that start together wait for the first one's compiler; a lock of a process
that died is no lock. Before it is used in a process it is compared with the reference on a small input.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .geometry import Geometry

_SOURCE = Path(__file__).with_name("dcnv3.cpp")

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w")
"""Not ``-ffast-math``: NaN must stay NaN, and it would change how the whole process treats subnormal numbers."""

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why there is no kernel on this machine."""


def forward(x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """The output, (N, Ho, Wo, C); arguments as of :func:`.reference.dcnv3`, on the CPU."""
    out = x.new_empty(x.shape[0], *geometry.size(*x.shape[1:3]), x.shape[3])
    _call(x, offset, mask, geometry, softmax, out=out)
    return out


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, offset and mask that are wanted; arguments as of :func:`.frugal.backward`."""
    of_x, of_offset, of_mask = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else None
        for t, want in zip((x, offset, mask), wanted, strict=True)
    )
    _call(x, offset, mask, geometry, softmax, grad=grad.to(x.dtype), of_x=of_x, of_offset=of_offset, of_mask=of_mask)
    return of_x, of_offset, of_mask


def _call(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
    *,
    out: Tensor | None = None,
    grad: Tensor | None = None,
    of_x: Tensor | None = None,
    of_offset: Tensor | None = None,
    of_mask: Tensor | None = None,
    kernel: Any = None,
) -> None:
    n, height, width, channels = x.shape
    sizes = (n, height, width, *geometry.size(height, width), geometry.groups, channels // geometry.groups)
    options = (geometry.points, softmax, _TYPES[x.dtype], _TYPES[offset.dtype], _TYPES[mask.dtype])
    numbers = (*sizes, *geometry.stride, *geometry.start, *options, torch.get_num_threads())
    grid = [part for point in geometry.grid for part in point]
    # Held in a list, so that copies live until the call returns.
    tensors = [None if t is None else t.contiguous() for t in (x, offset, mask, out, grad, of_x, of_offset, of_mask)]
    failed = (kernel or load())(
        (ctypes.c_int64 * len(numbers))(*numbers),
        (ctypes.c_int32 * len(grid))(*grid),
        ctypes.c_double(geometry.offset_scale),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
    )
    if failed:
        raise MemoryError(f"dcnv3: not enough memory for a map of {height} x {width}")


def available() -> bool:
    """Whether the kernel runs here; compiles it if need be. The first time that it does not, a warning says why."""
    try:
        load()
    except Unavailable as reason:
        _warn(str(reason))
        return False
    return True


def load() -> Any:
    """The function of the library; compiled, loaded and tested when first called.

    Raises:
        Unavailable: It cannot be compiled or loaded, or computes wrong numbers.
    """
    with _loading:
        if "outcome" not in _loaded:
            try:
                _loaded["outcome"] = _load()
            except Unavailable as reason:
                _loaded["outcome"] = reason
    outcome = _loaded["outcome"]
    if isinstance(outcome, Unavailable):
        raise outcome
    return outcome


def state() -> tuple[bool, str]:
    """Whether the kernel is there or can be expected to be, and a few words; compiles nothing."""
    outcome = _loaded.get("outcome")
    if isinstance(outcome, Unavailable):
        return False, str(outcome)
    if outcome is not None:
        return True, "compiled for this machine, in use"
    try:
        compiled = any(_library(flags).is_file() for flags in _flag_sets())
        if compiled:
            return True, "compiled for this machine"
        return True, f"will be compiled at the first call, by {_compiler()}"
    except Unavailable as reason:
        return False, str(reason)


_loaded: dict[str, Any] = {}
_loading = threading.Lock()


@lru_cache(maxsize=1)
def _warn(reason: str) -> None:
    warnings.warn(f"dcnv3 runs on slower PyTorch code: {reason}", stacklevel=2)


def _load() -> Any:
    if os.name != "posix":
        raise Unavailable(f"its C++ kernel is not made for {platform.system()}")
    found = [path for flags in _flag_sets() if (path := _library(flags)).is_file()]
    path = found[0] if found else _build()
    try:
        kernel = ctypes.CDLL(str(path)).torchgraft_dcnv3
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path} cannot be loaded, delete it: {_one_line(error)}") from error
    # A thread of its own has no hooks, no autocast and no mode of the caller's.
    with ThreadPoolExecutor(1) as pool:
        difference = pool.submit(_largest_difference, kernel).result()
    if not difference < 1e-4:
        raise Unavailable(f"{path} computes wrong numbers (off by {difference:.1e}), delete it")
    return kernel


def _flag_sets() -> list[tuple[str, ...]]:
    """From the fastest code to what every compiler can do."""
    here = ("-march=native",) if _processor() else ()
    return [(*_FLAGS, *here, "-fopenmp"), (*_FLAGS, "-fopenmp"), _FLAGS]


@lru_cache(maxsize=1)
def _processor() -> str:
    """The features of the processor; "" where they are not known and code for this very machine would be a risk."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return " ".join(sorted(line.partition(":")[2].split()))
    return ""


def _library(flags: Sequence[str]) -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(root) if root else cache / "torch_extensions"
    parts = (_SOURCE.read_text(encoding="utf-8"), *flags, platform.machine(), _processor(), torch.__version__)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return folder / "torchgraft_dcnv3" / key / "dcnv3.so"


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("no C++ compiler was found; install g++ or set CXX")


def _build() -> Path:
    compiler = _compiler()
    said = ""
    for flags in _flag_sets():
        path = _library(flags)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(path.parent / "lock"):
                if path.is_file():
                    return path
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    made = Path(folder) / path.name
                    _log.info("compiling %s to %s", _SOURCE, path)
                    command = [compiler, *flags, str(_SOURCE), "-o", str(made)]
                    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
                    if done.returncode == 0:
                        made.replace(path)
                        return path
                    said = said or _one_line(done.stderr)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{path.parent} could not be filled: {_one_line(error)}") from error
    raise Unavailable(f"{compiler} failed: {said}")


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    import fcntl  # only where there is POSIX

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _largest_difference(kernel: Any) -> float:
    """Between the kernel and the reference, relative to the largest number of each result."""
    geometry = Geometry.of(3, 1, 1, 1, 2, 2.0, False)
    random = torch.Generator().manual_seed(0)
    sizes = ((1, 5, 6, 32), (1, 5, 6, 36), (1, 5, 6, 18))
    x, offset, mask = (
        torch.randn(s, generator=random, dtype=torch.float32, device="cpu").requires_grad_() for s in sizes
    )
    expected = reference.dcnv3(x, offset, mask, geometry, True)
    expected_gradients = torch.autograd.grad(expected, (x, offset, mask), torch.ones_like(expected))
    x, offset, mask = x.detach(), offset.detach(), mask.detach()
    out, of_x, of_offset, of_mask = (torch.zeros_like(t) for t in (x, x, offset, mask))
    _call(x, offset, mask, geometry, True, out=out, kernel=kernel)
    gradients = {"of_x": of_x, "of_offset": of_offset, "of_mask": of_mask}
    _call(x, offset, mask, geometry, True, grad=torch.ones_like(out), **gradients, kernel=kernel)
    pairs = zip((out, of_x, of_offset, of_mask), (expected.detach(), *expected_gradients), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
