"""The Triton kernels of DCNv3: right under the interpreter, accepted by the compiler for a GPU, and right on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchgraft.ops import backend_in_use, dcnv3

from .dcnv3_cases import CASES, Case, apart, gradients, leaves

triton = pytest.importorskip("triton")

NUMBERS = ("height", "width", "pixels", "out_width", "groups")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_under_the_interpreter_the_kernels_equal_the_reference() -> None:
    cases = Path(__file__).with_name("interpreted_dcnv3.py")
    command = [sys.executable, "-m", "pytest", str(cases), "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def compiled(kernel: str, tensors: dict[str, str], absent: tuple[str, ...] = (), ones: tuple[str, ...] = ()) -> str:
    """Code for a GPU, which is not needed for this; pointers and sizes are multiples of 16 as in the network."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchgraft.ops.dcnv3 import triton_kernel

    function = getattr(triton_kernel, kernel)
    constants = triton_kernel._constants(torch.empty(1, 8, 8, 64), Case(groups=4).geometry, True)
    constants |= dict.fromkeys(absent) | dict.fromkeys(ones, 1)
    types = {**tensors, **{n: "i32" for n in NUMBERS if n not in ones}}
    source = ASTSource(
        function,
        {**types, **dict.fromkeys(constants, "constexpr")},
        constexprs={(function.arg_names.index(k),): v for k, v in constants.items()},
        attrs={(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in tensors},
    )
    code: str = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return code


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


FORWARD = ("x", "offset", "mask", "out")
BACKWARD = ("x", "offset", "mask", "grad", "of_x", "of_offset", "of_mask")


def test_the_forward_compiles_for_a_gpu_and_gathers_16_bytes_at_a_time() -> None:
    code = compiled("_forward", dict.fromkeys(FORWARD, "*fp32"))
    assert len(re.findall(r"ld\.global\.v4\.b32", code)) == 16  # 4 corners, 16 channels for each of 128 threads
    assert len(re.findall(r"st\.global\.v4\.b32", code)) == 4
    code = compiled("_forward", dict.fromkeys(FORWARD, "*bf16"))
    assert len(re.findall(r"ld\.global\.v4\.b32", code)) == 8


def test_the_backward_compiles_for_a_gpu_and_adds_only_to_what_is_wanted() -> None:
    every = dict.fromkeys(BACKWARD, "*fp32")
    assert re.search(r"(atom|red)\.\S*add", compiled("_backward", every))
    del every["of_x"]
    assert not re.search(r"(atom|red)\.\S*add", compiled("_backward", every, absent=("of_x",)))


def test_sizes_of_one_compile_for_a_gpu() -> None:
    """Triton makes a constant of every 1."""
    assert compiled("_forward", dict.fromkeys(FORWARD, "*fp32"), ones=NUMBERS)
    assert compiled("_backward", dict.fromkeys(BACKWARD, "*fp32"), ones=NUMBERS)


@needs_cuda
def test_on_cuda_the_default_is_triton() -> None:
    assert backend_in_use("cuda") == "triton"


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_backends_equal_the_reference_on_the_cpu(dtype: torch.dtype) -> None:
    bound = 1e-11 if dtype == torch.float64 else max(torch.finfo(dtype).eps, 5e-6)
    for case in CASES.values():
        inputs = case.inputs(dtype=dtype)
        wide = leaves(*(t.double() for t in inputs))
        exact = dcnv3(*wide, **case.arguments, softmax=True, backend="reference")
        expected = gradients(exact, wide)
        for backend in ("triton", "torch", "reference", "grid_sample", "torchvision"):
            there = leaves(*(t.cuda() for t in inputs))
            y = dcnv3(*there, **case.arguments, softmax=True, backend=backend)
            assert apart(y.cpu(), exact) < bound, (case, backend)
            given = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            for found, wanted in zip(torch.autograd.grad(y, there, given.to(y)), expected, strict=True):
                error = float((found.cpu().double() - wanted).abs().max())
                assert error < 2 * bound * max(1.0, float(wanted.abs().max())), (case, backend)


@needs_cuda
def test_on_cuda_a_module_compiles_whole() -> None:
    x, offset, mask = (t.cuda() for t in Case(channels=16).inputs(dtype=torch.float32))

    def run(x: torch.Tensor) -> torch.Tensor:
        return dcnv3(x + 1, offset, mask, groups=2, softmax=True) * 2

    assert apart(torch.compile(run, fullgraph=True)(x).cpu(), run(x).cpu()) < 1e-6
