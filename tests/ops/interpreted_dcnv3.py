"""The Triton kernels of DCNv3 on the CPU, under Triton's interpreter, against the reference.

Run by ``test_dcnv3_triton.py`` in a process of its own, because Triton chooses the interpreter when it is imported.
"""

from __future__ import annotations

import pytest
import torch

from torchgraft.ops import dcnv3
from torchgraft.ops.dcnv3 import triton_kernel

from .dcnv3_cases import CASES, Case, apart, gradients, leaves


@pytest.mark.parametrize("name", [*CASES, "plain, weights"])
def test_outputs_and_gradients_are_those_of_the_reference(name: str) -> None:
    case, softmax = CASES[name.removesuffix(", weights")], not name.endswith("weights")
    inputs = leaves(*case.inputs(n=1))
    options = {**case.arguments, "softmax": softmax}
    expected = dcnv3(*inputs, **options, backend="reference")
    y = dcnv3(*inputs, **options, backend="triton")
    assert apart(y, expected) < 1e-12
    for found, wanted in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert float((found - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 3, (torch.bfloat16, torch.float16, torch.float32), (torch.float16,) * 3],
    ids=str,
)
def test_narrow_and_mixed_types_are_computed_in_float32(dtypes: tuple[torch.dtype, ...]) -> None:
    case = Case(channels=16)
    inputs = leaves(*(t.to(d) for t, d in zip(case.inputs(n=1), dtypes, strict=True)))
    wide = leaves(*(t.double() for t in inputs))
    y = dcnv3(*inputs, **case.arguments, softmax=True, backend="triton")
    exact = dcnv3(*wide, **case.arguments, softmax=True, backend="reference")
    bounds = [max(torch.finfo(d).eps, torch.finfo(dtypes[0]).eps, 2e-6) for d in dtypes]
    assert y.dtype == dtypes[0]
    assert apart(y, exact) < bounds[0]
    found = gradients(y, inputs)
    assert tuple(t.dtype for t in found) == dtypes
    for ours, wanted, bound in zip(found, gradients(exact, wide), bounds, strict=True):
        assert apart(ours, wanted) < 2 * bound


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_that_are_needed_are_computed(wanted: tuple[bool, ...]) -> None:
    case = Case(groups=1, channels=8)
    inputs = case.inputs(n=1, dtype=torch.float32)
    grad = torch.randn(1, 5, 6, 8)
    arguments = (grad, *inputs, case.geometry, True)
    some = triton_kernel.backward(*arguments, wanted)
    every = triton_kernel.backward(*arguments, (True, True, True))
    for found, expected, want in zip(some, every, wanted, strict=True):
        assert torch.equal(found, expected) if want else found is None


@pytest.mark.parametrize("far", [1e30, float("nan")])
def test_what_lies_outside_is_zero_whatever_the_coordinate(far: float) -> None:
    case = Case(groups=1, channels=8)
    x, offset, mask = case.inputs(n=1)
    offset[..., 0] = far
    y = dcnv3(x, offset, mask, **case.arguments, backend="triton")
    offset[..., 0], mask[..., 0] = 2.5, 0.0
    assert apart(y, dcnv3(x, offset, mask, **case.arguments, backend="reference")) < 1e-12


def test_maps_that_need_several_programs_and_other_layouts_are_computed() -> None:
    case = Case((1, 2), padding=(0, 0), groups=2, channels=64, size=(9, 11), stride=(1, 2))
    turned = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in case.inputs()]
    y = dcnv3(*turned, **case.arguments, backend="triton")
    assert triton_kernel._grid(y, case.geometry) == (2, 2, 2)
    assert apart(y, dcnv3(*turned, **case.arguments, backend="reference")) < 1e-12
