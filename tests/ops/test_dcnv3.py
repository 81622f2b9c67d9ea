"""DCNv3: every backend computes the equation and its gradients, and refuses what it cannot compute."""

from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
from torch import Tensor

from torchgraft import GraftError
from torchgraft.lean.meter import saved_bytes
from torchgraft.ops import backend_in_use, dcnv3, describe, set_backend
from torchgraft.ops.dcnv3 import backends

from .dcnv3_cases import CASES, Case, apart, explicit, gradients, leaves

KERNELS = ("native", "torch")
BACKENDS = (*KERNELS, *backends.FORMS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return _or_skip(request.param)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return _or_skip(request.param)


def _or_skip(name: str) -> str:
    if name == "native" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    return name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_output_is_that_of_the_equation(case: Case, backend: str) -> None:
    x, offset, mask = case.inputs(n=1)
    y = dcnv3(x, offset, mask, **case.arguments, backend=backend)
    assert y.is_contiguous()
    assert apart(y, explicit(x, offset, mask, case)) < 1e-12


@pytest.mark.parametrize("softmax", [False, True], ids=["weights", "logits"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_reference(case: Case, softmax: bool, backend: str) -> None:
    inputs = leaves(*case.inputs())
    options = {**case.arguments, "softmax": softmax}
    expected = dcnv3(*inputs, **options, backend="reference")
    y = dcnv3(*inputs, **options, backend=backend)
    assert apart(y, expected) < 1e-12
    for found, wanted in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert float((found - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("softmax", [False, True], ids=["weights", "logits"])
def test_gradients_are_the_slopes_of_the_output(softmax: bool, backend: str) -> None:
    case = Case(groups=1, channels=2, size=(3, 2), offset_scale=1.5)
    inputs = leaves(*case.inputs(n=1))
    assert torch.autograd.gradcheck(
        lambda *tensors: dcnv3(*tensors, **case.arguments, softmax=softmax, backend=backend), inputs, fast_mode=True
    )


def test_weights_of_logits_are_those_of_a_softmax(backend: str) -> None:
    case = Case(channels=8)
    x, offset, logits = case.inputs()
    logits = 40 * logits
    weights = logits.unflatten(-1, (case.groups, 9)).softmax(-1).flatten(3)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        tensors = [t.to(dtype) for t in (x, offset, logits)]
        y = dcnv3(*tensors, **case.arguments, softmax=True, backend=backend)
        assert apart(y, dcnv3(x, offset, weights, **case.arguments, backend="reference")) < bound


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "grid_sample"])
def test_at_integers_the_derivative_is_the_one_to_the_right(name: str, scale: float) -> None:
    """As it is for all samples of a fresh network, whose offsets are zero; the first of a row lies at -1, outside."""
    backend = _or_skip(name)
    case = Case(groups=1, channels=3, size=(4, 4), offset_scale=scale)
    x, offset, mask = case.inputs(n=1)
    offset = torch.zeros_like(offset)
    (leaf,) = leaves(offset)
    given = torch.randn(1, 4, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(dcnv3(x, leaf, mask, **case.arguments, backend=backend), leaf, given)

    step = 2.0**-8  # between integers the output is linear in one offset, so the quotient is the derivative
    for axis, t in itertools.product(range(2), range(9)):
        moved = offset.clone()
        moved[..., 2 * t + axis] += step
        slopes = dcnv3(x, moved, mask, **case.arguments, backend="torch")
        slopes = (slopes - dcnv3(x, offset, mask, **case.arguments, backend="torch")) / step
        assert torch.allclose(found[..., 2 * t + axis], (slopes * given).sum(-1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(7, 7), (13, 13)])
def test_with_zero_offsets_every_kernel_has_the_gradients_of_deform_conv2d(size: tuple[int, int], kernel: str) -> None:
    case = Case(channels=16, size=size)
    x, offset, mask = case.inputs(dtype=torch.float32)
    inputs = leaves(x, torch.zeros_like(offset), mask)
    expected = gradients(dcnv3(*inputs, **case.arguments, backend="torchvision"), inputs)
    for found, wanted in zip(
        gradients(dcnv3(*inputs, **case.arguments, backend=kernel), inputs), expected, strict=True
    ):
        assert apart(found, wanted) < 2e-6


@pytest.mark.parametrize("far", [1e4, 1e30, float("inf"), -float("inf"), float("nan")])
def test_what_lies_outside_is_zero_whatever_the_coordinate(far: float, kernel: str) -> None:
    case = Case(channels=8)
    x, offset, mask = case.inputs()
    x[:, 0], x[:, :, 0] = float("inf"), float("nan")  # what is at the border must not leak in
    offset[..., 0] = far  # the first point of the first group
    inputs = leaves(x, offset, mask)
    y = dcnv3(*inputs, **case.arguments, backend=kernel)

    offset[..., 0], mask[..., 0] = 2.5, 0.0
    expected = dcnv3(x, offset, mask, **case.arguments, backend="reference")
    fine = expected.isfinite()
    assert fine.any()
    assert torch.allclose(y[fine], expected[fine], rtol=1e-12, atol=1e-12)
    of_offset, of_mask = torch.autograd.grad(y[fine].sum(), inputs[1:])
    assert of_offset[..., :2].abs().max() == 0
    assert of_mask[..., 0].abs().max() == 0


def test_nan_in_logits_and_maps_is_not_hidden(backend: str) -> None:
    case = Case(channels=8)
    x, offset, mask = case.inputs(dtype=torch.float32)
    for t in (0, 5):
        broken = mask.clone()
        broken[0, 2, 3, t] = float("nan")
        y = dcnv3(x, offset, broken, **case.arguments, softmax=True, backend=backend)
        assert y[0, 2, 3, :8].isnan().all()
        assert y[1].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_narrow_types_are_computed_in_float32_and_rounded_once(dtype: torch.dtype, backend: str) -> None:
    case = Case(channels=16)
    inputs = leaves(*case.inputs(dtype=dtype))
    wide = leaves(*(t.double() for t in inputs))
    y = dcnv3(*inputs, **case.arguments, softmax=True, backend=backend)
    exact = dcnv3(*wide, **case.arguments, softmax=True, backend="reference")
    assert y.dtype == dtype
    bound = max(torch.finfo(dtype).eps, 2e-6)
    assert apart(y, exact) < bound
    for found, wanted, own in zip(gradients(y, inputs), gradients(exact, wide), inputs, strict=True):
        assert found.dtype == own.dtype
        assert apart(found, wanted) < 2 * bound  # the gradient that comes in is rounded, too


def test_types_may_differ_and_results_keep_them(kernel: str) -> None:
    case = Case(channels=16)
    inputs = case.inputs()
    for dtypes in itertools.product(FLOATS, repeat=3):
        mixed = leaves(*(t.to(d) for t, d in zip(inputs, dtypes, strict=True)))
        y = dcnv3(*mixed, **case.arguments, backend=kernel)
        exact = dcnv3(*(t.detach().double() for t in mixed), **case.arguments, backend="reference")
        assert y.dtype == dtypes[0]
        assert apart(y, exact) < max(torch.finfo(dtypes[0]).eps, 2e-6)
        assert tuple(t.dtype for t in gradients(y, mixed)) == dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_passes_through_the_kernel(dtype: torch.dtype, kernel: str) -> None:
    """A kernel of one pixel without offset and with weight one copies the map."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1, 1, 1)
    still = torch.zeros(2**16, 1, 1, 2, dtype=dtype), torch.ones(2**16, 1, 1, 1, dtype=dtype)
    y = dcnv3(every, *still, kernel_size=1, padding=0, backend=kernel)
    assert torch.equal(y.isnan(), every.isnan())
    same = ~every.isnan()
    assert torch.equal(y[same], every[same])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_rounded_to_16_bits_as_torch_rounds(dtype: torch.dtype, kernel: str) -> None:
    one = torch.ones(1, dtype=dtype)
    weights = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(20000).remainder(
        50
    ).sub(30)
    mask = weights.view(-1, 1, 1, 1)
    y = dcnv3(one.expand(20000, 1, 1, 1), torch.zeros(20000, 1, 1, 2), mask, kernel_size=1, padding=0, backend=kernel)
    assert torch.equal(y.flatten(), weights.to(dtype))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("channels", [8, 40])
def test_only_the_gradients_that_are_needed_are_computed_and_are_the_same(
    wanted: tuple[bool, ...], channels: int, kernel: str
) -> None:
    case = Case(groups=1, channels=channels)
    inputs = leaves(*case.inputs(dtype=torch.float32))
    every = gradients(dcnv3(*inputs, **case.arguments, softmax=True, backend=kernel), inputs)
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    y = dcnv3(*inputs, **case.arguments, softmax=True, backend=kernel)
    some = gradients(y, [t for t in inputs if t.requires_grad])
    for found, expected in zip(some, itertools.compress(every, wanted), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [16, 40])
def test_results_do_not_depend_on_the_number_of_threads(channels: int) -> None:
    backend = _or_skip("native")
    case = Case(groups=2, channels=channels, size=(9, 8))
    inputs = leaves(*case.inputs(n=1, dtype=torch.float32))
    results = []
    for threads, of_x in ((1, True), (3, True), (5, False)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            inputs[0].requires_grad_(of_x)
            y = dcnv3(*inputs, **case.arguments, backend=backend)
            results.append([y, *gradients(y, inputs if of_x else inputs[1:])[-2:]])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_for_the_backward_nothing_but_the_inputs_is_kept(kernel: str) -> None:
    case = Case(channels=16)
    inputs = leaves(*case.inputs(dtype=torch.float32))
    assert saved_bytes(lambda: dcnv3(*inputs, **case.arguments, softmax=True, backend=kernel), own=inputs) == 0


def test_the_layout_of_the_inputs_does_not_matter(backend: str) -> None:
    case = Case(channels=8)
    plain = case.inputs(dtype=torch.float32)
    expected = dcnv3(*plain, **case.arguments, backend=backend)
    turned = leaves(*(t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in plain))
    y = dcnv3(*turned, **case.arguments, backend=backend)
    assert torch.equal(y, expected)
    given = torch.ones(1).expand(y.shape)
    for found, tensor in zip(torch.autograd.grad(y, turned, given), turned, strict=True):
        assert found.shape == tensor.shape


def test_a_batch_without_images_has_an_empty_output_and_empty_gradients(kernel: str) -> None:
    case = Case(stride=(2, 2), size=(7, 7))
    inputs = leaves(*case.inputs(n=0, dtype=torch.float32))
    y = dcnv3(*inputs, **case.arguments, backend=kernel)
    assert y.shape == (0, 4, 4, 8)
    assert [g.shape for g in torch.autograd.grad(y.sum(), inputs)] == [t.shape for t in inputs]


def test_an_adapter_can_copy_and_run_a_module_that_calls_it() -> None:
    class Sampler(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 27)

        def forward(self, x: Tensor) -> Tensor:
            offset, mask = self.linear(x).split([18, 9], -1)
            return dcnv3(x, offset, mask, groups=1, softmax=True)

    module, x = Sampler(), torch.randn(1, 4, 5, 8)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


MISTAKES = {
    "channels": ({"groups": 3}, r"x has 8 channels, which groups=3 does not divide"),
    "offset": ({"kernel_size": 1, "padding": 0}, r"offset has shape \[2, 5, 6, 36\], expected \[2, 5, 6, 4\]"),
    "size": ({"stride": 2}, r"offset has shape \[2, 5, 6, 36\], expected \[2, 3, 3, 36\].*stride=\[2, 2\]"),
    "small": ({"dilation": 9}, r"a map of 5 x 6 is too small for kernel_size=\[3, 3\].*dilation=\[9, 9\]"),
    "kernel": ({"kernel_size": 0}, r"kernel_size is .*at least 1"),
    "padding": ({"padding": -1}, r"padding is .*at least 0"),
    "groups": ({"groups": 0}, r"groups is 0; it must be at least 1"),
    "centre": ({"kernel_size": 2, "remove_center": True}, r"remove_center needs an odd square kernel.*\[2, 2\]"),
    "backend": ({"backend": "natve"}, r"no backend 'natve'; did you mean 'native'"),
    "triton": ({"backend": "triton"}, r"triton"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_was_given_and_expected(name: str) -> None:
    options, message = MISTAKES[name]
    with pytest.raises(GraftError, match=message) as caught:
        dcnv3(*Case().inputs(dtype=torch.float32), **{"groups": 2, **options})
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_belong_together_are_refused(backend: str) -> None:
    x, offset, mask = Case().inputs(dtype=torch.float32)
    options = {"groups": 2, "backend": backend}
    with pytest.raises(GraftError, match=r"x has shape \[5, 6, 8\]; 4 dimensions"):
        dcnv3(x[0], offset, mask, **options)
    with pytest.raises(GraftError, match=r"mask has shape \[2, 5, 6, 9\], expected \[2, 5, 6, 18\]"):
        dcnv3(x, offset, mask[..., :9], **options)
    with pytest.raises(GraftError, match=r"offset has shape \[1, 5, 6, 36\], expected \[2, 5, 6, 36\]"):
        dcnv3(x, offset[:1], mask, **options)
    with pytest.raises(GraftError, match=r"offset is torch\.float64 and x torch\.float32"):
        dcnv3(x, offset.double(), mask, **options)
    with pytest.raises(GraftError, match=r"x is torch\.int64; one of float32"):
        dcnv3(x.long(), offset, mask, **options)
    with pytest.raises(GraftError, match="offset is on meta and x on cpu"):
        dcnv3(x, offset.to("meta"), mask, **options)


def test_the_backend_can_be_set_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_chosen", None)
    inputs = Case().inputs(dtype=torch.float32)
    assert backend_in_use("mps") == "torch"
    for name in ("torch", "reference", "grid_sample"):
        set_backend(name)
        assert backend_in_use() == name
        assert describe()[-1][:2] == ("dcnv3 backend", "ok")
        assert torch.equal(dcnv3(*inputs, groups=2), dcnv3(*inputs, groups=2, backend=name))
    set_backend("grid_sample")
    with pytest.raises(GraftError, match=r"grid_sample is no kernel of torch.ops.torchgraft.dcnv3"):
        torch.ops.torchgraft.dcnv3(*inputs, 3, 1, 1, 1, 2, 1.0, False, False, None)
    set_backend("native")
    with pytest.raises(GraftError, match="backend native runs on cpu, the tensors are on cuda"):
        backend_in_use("cuda")
    with pytest.raises(GraftError, match="no backend 'gridsample'; did you mean 'grid_sample'"):
        set_backend("gridsample")
    set_backend(None)
    assert backend_in_use() in ("native", "torch")
