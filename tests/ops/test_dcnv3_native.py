"""The C++ kernel of DCNv3: compiled once and only when needed, and given up with one warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from torchgraft import GraftError
from torchgraft.ops import backend_in_use, dcnv3, describe
from torchgraft.ops.dcnv3 import native

from .dcnv3_cases import Case

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the kernel is made for POSIX systems")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not asked for the kernel yet, and an empty folder of extensions."""
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    native._warn.cache_clear()
    return tmp_path


def compiler(folder: Path, does: str) -> str:
    """A compiler of the test's own: a shell script in which OUT is the file it should write."""
    script = folder / "cxx"
    script.write_text(f"#!/bin/sh\nfor OUT; do :; done\necho called >> {folder}/calls\n{does}\n")
    script.chmod(0o755)
    return str(script)


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines()) if (folder / "calls").exists() else 0


@pytest.fixture
def compiled() -> Path:
    """The library of this machine, compiled by the first test that asks for it."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    native.load()
    return next(path for flags in native._flag_sets() if (path := native._library(flags)).is_file())


def test_nothing_is_compiled_until_a_cpu_tensor_comes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(fresh, "exit 1"))
    program = (
        "import torch, torchgraft.ops as o; o.describe(); x = torch.empty(1, 4, 4, 4, device='meta');"
        "o.dcnv3(x, x.new_empty(1, 4, 4, 18), x.new_empty(1, 4, 4, 9), groups=1)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert calls(fresh) == 0
    assert describe()[0] == ("dcnv3 on CPUs", "ok", f"will be compiled at the first call, by {fresh}/cxx")


def test_what_was_compiled_is_found_again(compiled: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(fresh, f"cp {compiled} $OUT"))
    assert native.available()
    assert calls(fresh) == 1
    assert describe()[0][2] == "compiled for this machine, in use"
    monkeypatch.setattr(native, "_loaded", {})
    assert describe()[0][2] == "compiled for this machine"
    assert native.available()
    assert calls(fresh) == 1


@pytest.mark.slow
def test_processes_that_start_together_compile_once(
    compiled: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(fresh, f"sleep 1; cp {compiled} $OUT"))
    program = "from torchgraft.ops import backend_in_use; assert backend_in_use() == 'native'"
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert calls(fresh) == 1


def test_without_openmp_or_the_processors_own_code_it_is_compiled_for_what_there_is(
    compiled: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = 'case "$*" in *-fopenmp*) echo no openmp here >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", compiler(fresh, f"{refuse}\ncp {compiled} $OUT"))
    assert native.available()
    assert native._library(native._FLAGS).is_file()


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("echo dcnv3.cpp: no such thing as C++ >&2; exit 1", "cxx failed: dcnv3.cpp: no such thing as C"),
        ("echo nothing > $OUT", "cannot be loaded, delete it"),
    ],
)
def test_where_it_cannot_be_made_one_warning_says_why_and_torch_computes(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, does: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", compiler(fresh, does))
    inputs = Case().inputs(dtype=torch.float32)
    with pytest.warns(UserWarning, match=f"dcnv3 runs on slower PyTorch code: .*{reason}"):
        y = dcnv3(*inputs, groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(dcnv3(*inputs, groups=2), y)
    assert torch.equal(dcnv3(*inputs, groups=2, backend="torch"), y)
    assert backend_in_use() == "torch"
    name, state, detail = describe()[0]
    assert (name, state) == ("dcnv3 on CPUs", "absent")
    assert "\n" not in detail
    with pytest.raises(GraftError, match=f"backend native does not run here: .*{reason}"):
        dcnv3(*inputs, groups=2, backend="native")


def test_without_a_compiler_or_a_folder_it_says_what_to_do(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(native.Unavailable, match=r"no C\+\+ compiler was found; install g\+\+ or set CXX"):
        native.load()
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setenv("CXX", compiler(fresh, "exit 0"))
    (fresh / "extensions").write_text("a file where the folder should be")
    with pytest.raises(native.Unavailable, match=r"extensions.* could not be filled"):
        native.load()


def test_a_library_that_computes_wrong_numbers_is_not_used(
    compiled: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(fresh, f"cp {compiled} $OUT"))
    right = native.reference.dcnv3
    monkeypatch.setattr(native.reference, "dcnv3", lambda *a: 1.001 * right(*a))
    with pytest.raises(native.Unavailable, match=r"computes wrong numbers \(off by 1.0e-03\), delete it"):
        native.load()


def test_the_key_of_the_library_names_source_flags_processor_and_torch(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {native._library(flags) for flags in native._flag_sets()}
    assert len(keys) == len(native._flag_sets())
    monkeypatch.setattr(native, "_processor", lambda: "another")
    keys.add(native._library(native._FLAGS))
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.add(native._library(native._FLAGS))
    changed = fresh / "dcnv3.cpp"
    changed.write_text("// changed")
    monkeypatch.setattr(native, "_SOURCE", changed)
    keys.add(native._library(native._FLAGS))
    assert len(keys) == len(native._flag_sets()) + 3


def test_the_self_test_sees_no_mode_of_the_caller(compiled: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved-tensor hooks, inference and autocast are the caller's business."""
    monkeypatch.setenv("CXX", compiler(fresh, f"cp {compiled} $OUT"))
    seen: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)
    with torch.inference_mode(), hooks, torch.autocast("cpu"):
        assert native.available()
    assert not seen
