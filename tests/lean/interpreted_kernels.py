"""The Triton kernels on the CPU, under Triton's interpreter: equal to the numpy version, bit for bit.

Run by ``test_masks_triton.py`` in a process of its own, because Triton chooses the interpreter when it is imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchgraft.lean import masks, masks_triton
from torchgraft.lean.saved import Layout

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTERVALS = [(0.0, None), (0.0, 6.0), (-3.0, 3.0), (-0.1, 0.7)]


def values(n: int, dtype: torch.dtype) -> Tensor:
    """Random values, with what is special at both ends."""
    x = 4 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    special = [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 6.0, -3.0, 3.0, -0.1, 0.7, 1e-45]
    if n > 2 * len(special):
        x[: len(special)] = x[-len(special) :] = torch.tensor(special, dtype=torch.float64)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [0, 9, 2048, 4099])
def test_packed_bytes_equal_those_of_numpy(n: int, dtype: torch.dtype) -> None:
    x = values(n, dtype)
    for low, high in INTERVALS:
        for nan in (False, True):
            expected = masks.pack_inside(x, low, high, nan=nan)
            assert torch.equal(masks_triton.pack(x, low, high, nan), expected), (low, high, nan)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [0, 2057])
def test_unpacked_values_and_masked_gradients_equal_those_of_numpy(n: int, dtype: torch.dtype) -> None:
    x, grad = values(n, dtype), values(n, dtype).flip(0)
    bits = masks.pack_inside(x, 0.0)
    for inside, outside in ((1.0, 0.0), (0.1, -float("inf"))):
        expected = masks.unpack_inside(bits, Layout(x), inside, outside)
        assert torch.equal(masks_triton.unpack(bits, torch.empty_like(x), inside, outside), expected)
    expected = masks.masked_gradient(bits, grad, Layout(x))
    assert torch.equal(masks_triton.masked_gradient(bits, grad).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_every_layout_goes_through_the_kernels_as_through_numpy(
    monkeypatch: pytest.MonkeyPatch, layout: str, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 5, 3, 7)
    x = x > 0 if dtype == torch.bool else x.to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x[:, ::2, :, 1:]
    elif layout == "expanded":
        x = x[:, :1].expand(2, 4, 3, 7)
    grad = torch.randn(x.shape).to(dtype)

    def run() -> list[Tensor]:
        bits = masks.pack_inside(x, 0.0)
        back = masks.unpack_inside(bits, Layout(x))
        return [bits, back] if dtype == torch.bool else [bits, back, masks.masked_gradient(bits, grad, Layout(x))]

    expected = run()
    monkeypatch.setattr(masks, "engine", lambda t: "triton")
    for found, wanted in zip(run(), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert found.stride() == wanted.stride()
        assert torch.equal(found, wanted)
