"""Bit masks: a stand-in made from one bit per element gives the very gradient that the whole tensor gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchgraft.lean import masks
from torchgraft.lean.masks import Bits, is_dense, masked_gradient, memory_order, pack_inside, unpack_inside
from torchgraft.lean.saved import Layout

aten = torch.ops.aten
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Operator = Callable[[Tensor, Tensor], Tensor]
OPERATORS: dict[str, tuple[tuple[float, float | None], bool, tuple[float, float], Operator]] = {
    "relu": ((0.0, None), True, (1.0, 0.0), lambda g, x: aten.threshold_backward(g, x, 0)),
    "leaky_relu": ((0.0, None), False, (1.0, -1.0), lambda g, x: aten.leaky_relu_backward(g, x, 0.1, False)),
    "relu6": ((0.0, 6.0), False, (3.0, 0.0), lambda g, x: aten.hardtanh_backward(g, x, 0.0, 6.0)),
    "hardtanh": ((-0.1, 0.7), False, (0.3, -float("inf")), lambda g, x: aten.hardtanh_backward(g, x, -0.1, 0.7)),
    "hardsigmoid": ((-3.0, 3.0), False, (0.0, 3.0), lambda g, x: aten.hardsigmoid_backward(g, x)),
}


def hard_values(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type; else what is special, the neighbours of every bound, and random values."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    info = torch.finfo(dtype)
    bounds = torch.tensor([0.0, -0.0, 6.0, -3.0, 3.0, -0.1, 0.7, info.tiny, -info.tiny], dtype=dtype)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    special = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), info.max, info.min], dtype=dtype)
    random = 4 * torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    # Twice over, so that every value meets PyTorch's vector loop too, not only the loop for the rest.
    near = torch.cat([bounds, bounds.nextafter(infinity), bounds.nextafter(-infinity), special])
    return torch.cat([near.repeat(16), random])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_stand_in_gives_the_native_gradient_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    interval, nan, (inside, outside), native = OPERATORS[name]
    x = hard_values(dtype)
    if name in ("relu6", "hardtanh"):
        # PyTorch itself decides NaN differently in its vector loop and in the loop for the rest.
        x = x[~x.isnan()]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad[::97], grad[1::97] = float("inf"), float("nan")

    stand_in = unpack_inside(pack_inside(x, *interval, nan=nan), Layout(x), inside, outside)

    assert torch.equal(native(grad, x).nan_to_num(7.0), native(grad, stand_in).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_is_inside_only_when_asked(dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), -float("nan"), 1.0, -1.0], dtype=dtype)
    for bounds in ((0.0, None), (-3.0, 3.0)):
        plain = unpack_inside(pack_inside(x, *bounds), Layout(x))
        asked = unpack_inside(pack_inside(x, *bounds, nan=True), Layout(x))
        assert plain[:2].tolist() == [0, 0]
        assert asked[:2].tolist() == [1, 1]
        assert torch.equal(plain[2:], asked[2:])


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("high", [None, 0.5])
def test_bits_are_those_of_packbits_whatever_the_size_and_the_chunks(
    monkeypatch: pytest.MonkeyPatch, high: float | None, nan: bool
) -> None:
    monkeypatch.setattr(masks, "_CHUNK", 64)
    for n in (0, 1, 7, 8, 9, 63, 64, 65, 128, 200, 321):
        x = torch.randn(n)
        inside = (x > 0) if high is None else (x > 0) & (x < high)
        bits = pack_inside(x, 0.0, high, nan=nan)
        assert bits.dtype == torch.uint8
        assert np.array_equal(bits.numpy(), np.packbits(inside.numpy()))
        assert torch.equal(unpack_inside(bits, Layout(x)), inside.float())


def layouts() -> dict[str, Tensor]:
    x = torch.randn(2, 3, 5, 7)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2),
        "one": torch.randn(()),
        "empty": torch.randn(3, 0, 2),
        "offset": torch.randn(40)[3:25].view(2, 11),
        "ones in the shape": torch.randn(4, 1, 3, 1).to(memory_format=torch.channels_last),
        "sliced": x[:, :, ::2, 1:],
        "expanded": torch.randn(3, 1, 4).expand(3, 5, 4),
        "overlapping": torch.randn(12).as_strided((4, 4), (2, 1)),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", layouts())
def test_every_layout_comes_back_with_its_values_and_its_strides_if_they_are_dense(
    name: str, dtype: torch.dtype
) -> None:
    x = layouts()[name]
    # Not a cast, which would make the views dense.
    base = torch.randn(x.untyped_storage().nbytes() // 4).to(dtype)
    x = base.as_strided(x.shape, x.stride(), x.storage_offset())

    bits = pack_inside(x, 0.0)
    back = unpack_inside(bits, Layout(x), 2.0, -1.0)

    assert bits.shape == ((x.numel() + 7) // 8,)
    assert back.dtype == dtype
    assert torch.equal(back, torch.where(x > 0, 2.0, -1.0).to(dtype))
    assert back.stride() == (x.stride() if is_dense(x.shape, x.stride()) else x.contiguous().stride())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", layouts())
def test_the_masked_gradient_is_that_of_relu_even_where_it_is_infinite(name: str, dtype: torch.dtype) -> None:
    x = layouts()[name].to(dtype)
    bits = pack_inside(x, 0.0, nan=True)
    for grad in (torch.randn(x.shape), torch.randn(x.shape[::-1]).permute(tuple(reversed(range(x.dim()))))):
        grad = grad.to(dtype)
        grad[torch.rand(grad.shape) < 0.3] = float("inf")
        before = grad.clone()
        assert torch.equal(masked_gradient(bits, grad, Layout(x)), aten.threshold_backward(grad, x, 0))
        assert torch.equal(grad, before)


def test_is_dense_agrees_with_a_count_of_the_places() -> None:
    shapes = list(itertools.product((1, 2, 3), repeat=3))
    for shape, stride in itertools.product(shapes, itertools.product((0, 1, 2, 3, 4, 6, 9), repeat=3)):
        places = [sum(a * b for a, b in zip(at, stride, strict=True)) for at in itertools.product(*map(range, shape))]
        assert is_dense(shape, stride) == (sorted(places) == list(range(len(places)))), (shape, stride)


def test_memory_order_of_a_dense_tensor_is_a_view_of_it() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert memory_order(x).data_ptr() == x.data_ptr()
    assert torch.equal(memory_order(x), x.permute(0, 2, 3, 1).flatten())


def test_a_tensor_that_requires_grad_can_be_packed() -> None:
    x = torch.randn(9, requires_grad=True)
    for t in (x, torch.nn.Parameter(x.detach()), x * 2):
        assert torch.equal(unpack_inside(pack_inside(t, 0.0), Layout(t)), (t > 0).float())


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_without_data_the_sizes_are_right(where: str) -> None:
    def check(x: Tensor) -> None:
        bits = pack_inside(x, 0.0, nan=True)
        assert type(bits) is type(x)
        assert (bits.shape, bits.dtype, bits.device) == ((8,), torch.uint8, x.device)
        back = unpack_inside(bits, Layout(x))
        assert (back.shape, back.stride(), back.dtype, back.device) == (x.shape, x.stride(), x.dtype, x.device)
        assert masked_gradient(bits, x, Layout(x)).stride() == x.stride()

    if where == "meta":
        check(torch.empty(2, 3, 10, dtype=torch.bfloat16, device="meta").permute(1, 0, 2))
    else:
        with FakeTensorMode():
            x = torch.randn(2, 3, 10).permute(1, 0, 2)
        check(x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", layouts())
def test_the_bool_mask_of_other_devices_says_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    x = layouts()[name].to(dtype)
    if x.is_contiguous():
        x[torch.rand(x.shape) < 0.2] = float("nan")
    grad = torch.randn_like(x)
    for bounds, nan in itertools.product(((0.0, None), (-0.5, 0.5)), (False, True)):
        bits = pack_inside(x, *bounds, nan=nan)
        expected = unpack_inside(bits, Layout(x), 0.1, -0.3), masked_gradient(bits, grad, Layout(x))
        with monkeypatch.context() as patched:
            patched.setattr(masks, "engine", lambda t: "bool")
            mask = pack_inside(x, *bounds, nan=nan)
            assert mask.dtype == torch.bool
            found = unpack_inside(mask, Layout(x), 0.1, -0.3), masked_gradient(mask, grad, Layout(x))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype == dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ["numpy", "bool"])
def test_bool_tensors_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setattr(masks, "engine", lambda t: engine)
    mask = torch.rand(3, 5, 7).permute(2, 0, 1) < 0.5
    back = unpack_inside(pack_inside(mask, 0.0), Layout(mask))
    assert back.dtype == torch.bool
    assert torch.equal(back, mask)


def test_hooks_outside_keep_the_bits() -> None:
    seen: list[Tensor] = []

    def outer(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    x = torch.randn(4, 20)
    packed = Bits(x, (0.0, None), (1.0, 0.0), (outer, lambda t: t))
    assert [t.nbytes for t in seen] == [10]
    assert torch.equal(packed.unpack(), (x > 0).float())
