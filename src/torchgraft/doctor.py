"""What torchgraft finds on this machine, each with what to do about it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        state: ``ok``; ``absent`` where something optional is missing; ``broken`` where something required is.
        detail: What was found.
        advice: What to do; empty where nothing needs to be done.
    """

    name: str
    state: Literal["ok", "absent", "broken"]
    detail: str
    advice: str = ""


_MODULES = {"pyyaml": "yaml", "pillow": "PIL"}
"""Distributions whose module has another name."""

_LISTED_ELSEWHERE = ("demo", "dev")
"""Extras that users see under another heading (demo: the assets) or do not need (dev)."""


def examine() -> list[Finding]:
    """Look at everything; a check that fails becomes a finding and never an exception."""
    findings: list[Finding] = []
    for check in _CHECKS:
        findings += _safely(check)
    return findings


def _safely(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:
        name = check.__name__.lstrip("_").replace("_", " ")
        line = " ".join(f"{type(error).__name__}: {error}".split())
        found.append(Finding(name, "broken", line, "install torchgraft again in a fresh environment"))
    return found


def _python() -> Iterator[Finding]:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", "ok", detail)
    yield Finding("torchgraft", "ok", metadata.version("torchgraft"))


def _packages() -> Iterator[Finding]:
    for name, lowest, extra in _requirements():
        if extra:
            continue
        advice = f'pip install "{name}>={lowest}"'
        try:
            version = metadata.version(name)
            importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
        except metadata.PackageNotFoundError:
            yield Finding(name, "broken", "not installed", advice)
        except Exception as error:
            line = " ".join(str(error).split())
            yield Finding(name, "broken", f"cannot be imported: {line}", f"{advice} --force-reinstall")
        else:
            old = _release(version) < _release(lowest)
            yield Finding(name, "broken" if old else "ok", version, advice if old else "")


def _torch_computes() -> Iterator[Finding]:
    import torch

    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    torch.nn.functional.conv2d(x, torch.randn(4, 3, 3, 3)).sum().backward()
    yield Finding("convolution and gradient", "ok", "computed on the CPU")


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 1e9:.0f} GB"
            yield Finding(f"cuda:{index}", "ok", f"{properties.name}, {memory}, CUDA {torch.version.cuda}")
    else:
        advice = "none is needed; with an NVIDIA GPU install its driver and a CUDA build of torch"
        yield Finding("cuda", "absent", "no usable GPU; the CPU is used", advice)
    if sys.platform == "darwin":
        state: Literal["ok", "absent"] = "ok" if torch.backends.mps.is_available() else "absent"
        yield Finding("mps", state, "Apple GPU" if state == "ok" else "not available")


def _compilers() -> Iterator[Finding]:
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler and shutil.which(compiler):
        yield Finding("C++ compiler", "ok", str(shutil.which(compiler)))
    else:
        advice = "only torch.compile and fast operators need one; Debian: apt install g++"
        yield Finding("C++ compiler", "absent", "none found; slower pure torch code is used", advice)


def _operators() -> Iterator[Finding]:
    from torchgraft.ops import describe

    advice = "install a C++ compiler (Debian: apt install g++); the kernel is compiled when it is first called"
    for name, state, detail in describe():
        yield Finding(name, state, detail, advice if state == "absent" else "")


def _threads() -> Iterator[Finding]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"torch uses {torch.get_num_threads()} of {usable} usable cores"
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    crowded = busy + torch.get_num_threads() > 1.5 * usable
    advice = "the machine is busy: OMP_NUM_THREADS=1 is faster then" if crowded else ""
    yield Finding("threads", "ok", f"{detail}, load {busy:.1f}", advice)


def _memory() -> Iterator[Finding]:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield Finding("memory", "ok", f"{total / 1e9:.0f} GB")


def _disk() -> Iterator[Finding]:
    for name, folder in (("this folder", "."), ("temporary folder", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        detail = f"{free / 1e9:.1f} GB free"
        if not os.access(folder, os.W_OK):
            yield Finding(name, "absent", "cannot be written", "give every run another folder with --out")
        else:
            yield Finding(name, "ok", detail, "" if free > 1e9 else "little space is left")


def _registries() -> Iterator[Finding]:
    import torchgraft
    from torchgraft.backbones import list_backbones

    yield Finding("methods", "ok", ", ".join(sorted(torchgraft.methods())))
    yield Finding("backbones", "ok", f"{len(list_backbones()):,} names")


def _assets() -> Iterator[Finding]:
    from torchgraft.backbones import list_assets

    for asset in list_assets():
        if asset.installed:
            yield Finding(asset.name, "ok", f"{asset.kind} from {asset.package} {asset.version}")
        else:
            yield Finding(asset.name, "absent", f"{asset.kind}, not installed", str(asset.how_to_get))


def _extras() -> Iterator[Finding]:
    for name, _, extra in _requirements():
        if not extra or extra in _LISTED_ELSEWHERE:
            continue
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "absent", f"needed by {extra} only", f'pip install "torchgraft[{extra}]"')


_CHECKS = (
    _python, _packages, _torch_computes, _devices, _compilers, _operators, _threads, _memory, _disk, _registries,
    _assets, _extras,
)  # fmt: skip


def _requirements() -> list[tuple[str, str, str]]:
    """Name, lowest version and extra ("" where it is always needed) of what the package declares to need."""
    parsed = []
    for line in metadata.requires("torchgraft") or []:
        name = re.match(r"[\w.-]+", line)
        lowest = re.search(r"[>=]=\s*([\d.]+)", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name:
            parsed.append((name[0], lowest[1] if lowest else "0", extra[1] if extra else ""))
    return parsed


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version in front of any letters: ``2.14.1+cpu`` is (2, 14, 1)."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not part[:1].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)
