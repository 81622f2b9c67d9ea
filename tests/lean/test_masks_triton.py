"""The kernels of the bit masks: right under Triton's interpreter, and accepted by its compiler for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchgraft.lean import masks
from torchgraft.lean.saved import Layout

triton = pytest.importorskip("triton")


def test_under_the_interpreter_the_kernels_equal_numpy() -> None:
    cases = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", str(cases), "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


KERNELS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "pack": ("_pack", {"x": "*fp32", "bits": "*u8", "n": "i32"}, {"LOW": 0.0, "HIGH": 6.0, "NAN": True}),
    "unpack": ("_unpack", {"bits": "*u8", "out": "*bf16", "n": "i32"}, {"INSIDE": 1.0, "OUTSIDE": 0.0}),
    "gradient": ("_masked_gradient", {"bits": "*u8", "grad": "*bf16", "out": "*bf16", "n": "i32"}, {}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_for_a_gpu_and_move_16_bytes_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A GPU is not needed for this; pointers and sizes are multiples of 16, as those of activations are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchgraft.lean import masks_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants = KERNELS[name]
    function = getattr(masks_triton, kernel)
    constants = {**constants, "BLOCK": masks_triton._BLOCK}
    source = ASTSource(
        function,
        {**types, **dict.fromkeys(constants, "constexpr")},
        constexprs={(function.arg_names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]

    accesses = set(re.findall(r"(?:ld|st)\.global\S*", code))
    assert accesses <= {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.b8", "st.global.b8"}
    assert any("v4" in access for access in accesses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool], ids=str)
def test_on_cuda_the_kernels_equal_numpy(dtype: torch.dtype) -> None:
    x = torch.randn(3, 17, 29, 31).to(memory_format=torch.channels_last)
    x = x > 0 if dtype == torch.bool else x.to(dtype)
    bits = masks.pack_inside(x, 0.0)
    on_gpu = masks.pack_inside(x.cuda(), 0.0)
    assert torch.equal(on_gpu.cpu(), bits)
    back = masks.unpack_inside(on_gpu, Layout(x))
    assert back.is_cuda
    assert torch.equal(back.cpu(), masks.unpack_inside(bits, Layout(x)))
    if dtype != torch.bool:
        grad = torch.randn(x.shape).to(dtype)
        expected = masks.masked_gradient(bits, grad, Layout(x))
        assert torch.equal(masks.masked_gradient(on_gpu, grad.cuda(), Layout(x)).cpu(), expected)
