"""Max-pool indices and dropout masks come back from their few bits as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchgraft.lean.pooling import pack_dropout, pack_indices
from torchgraft.lean.saved import Layout

POOLS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "stem": (nn.MaxPool2d(3, 2, 1), (2, 3, 17, 12)),
    "unbatched": (nn.MaxPool2d(3, 2, 1), (3, 9, 12)),
    "disjoint": (nn.MaxPool2d(2), (2, 3, 8, 7)),
    "dilated": (nn.MaxPool2d((3, 2), (1, 2), (1, 0), (2, 3)), (2, 3, 11, 13)),
    "ceil": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 2, 8, 10)),
    "one place": (nn.MaxPool2d(1, 2), (1, 2, 5, 5)),
    "sixteen places": (nn.MaxPool2d(4, 3), (1, 3, 9, 10)),
    "many places": (nn.MaxPool2d(5, 1, 2), (1, 3, 9, 8)),
    "256 places": (nn.MaxPool2d(16, 3), (1, 2, 20, 22)),
    "too many places": (nn.MaxPool2d(17, 2), (1, 3, 20, 23)),
    "narrow plane": (nn.MaxPool2d(3, 1, 1), (1, 2, 5, 1)),
    "row": (nn.MaxPool2d(3, 1, 1), (1, 2, 1, 6)),
    "1-d": (nn.MaxPool1d(3, 2, 1), (2, 3, 11)),
    "1-d unbatched": (nn.MaxPool1d(4, dilation=2), (3, 23)),
    "3-d": (nn.MaxPool3d(2, 2), (2, 3, 4, 6, 5)),
    "3-d dilated": (nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 2), ceil_mode=True), (1, 2, 3, 8, 9)),
    "nothing": (nn.MaxPool2d(2), (0, 3, 4, 4)),
}


def kept_by(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What autograd keeps of the layer."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    return kept


def indices_of(pool: nn.Module, x: Tensor) -> Tensor:
    (indices,) = [t for t in kept_by(pool, x) if t.dtype == torch.int64]
    return indices


LAYOUTS = [(name, False) for name in POOLS] + [(name, True) for name in POOLS if len(POOLS[name][1]) == 4]


@pytest.mark.parametrize("content", ["random", "equal", "-inf", "nan"])
@pytest.mark.parametrize(("name", "channels_last"), LAYOUTS)
def test_indices_come_back_equal(name: str, channels_last: bool, content: str) -> None:
    pool, shape = POOLS[name]
    x = torch.randn(shape)
    if content != "random":
        x.fill_({"equal": 1.0, "-inf": -float("inf"), "nan": float("nan")}[content])
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    indices = indices_of(pool, x)

    back = pack_indices(indices, x.shape, pool, None).unpack()

    assert back.dtype == torch.int64
    assert back.stride() == indices.stride()
    assert torch.equal(back, indices)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("stem", 4), ("one place", 4), ("sixteen places", 4), ("many places", 8), ("256 places", 8), ("3-d", 4)],
)
def test_indices_take_4_or_8_bits(name: str, bits: int) -> None:
    pool, shape = POOLS[name]
    indices = indices_of(pool, torch.randn(shape))
    (places,) = handed(pack_indices, indices, torch.Size(shape), pool)
    assert places.nbytes == -(-indices.numel() * bits // 8)


def test_the_indices_of_large_windows_take_32_bits() -> None:
    pool, shape = POOLS["too many places"]
    indices = indices_of(pool, torch.randn(shape))
    assert [t.nbytes for t in handed(pack_indices, indices, torch.Size(shape), pool)] == [4 * indices.numel()]


def handed(pack: Any, *args: Any) -> list[Tensor]:
    """The tensors that the hooks outside are given."""
    given: list[Tensor] = []
    pack(*args, (lambda t: given.append(t) or t, lambda t: t))
    return given


@pytest.mark.parametrize("name", POOLS)
def test_the_gradient_of_a_pool_without_its_input_is_the_native_one(name: str) -> None:
    pool, shape = POOLS[name]
    x = torch.randn(shape)

    def pack(t: Tensor) -> Any:
        return pack_indices(t, x.shape, pool, None) if t.dtype == torch.int64 else Layout(t)

    def gradient() -> Tensor:
        y = pool(x.requires_grad_())
        return torch.autograd.grad(y, x, torch.arange(y.numel(), dtype=y.dtype).view_as(y))[0]

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.unpack()):
        found = gradient()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 1 / 3, 0.5, 0.9, 0.999])
def test_dropout_noise_comes_back_bit_for_bit_from_one_bit_an_element(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, 11, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
    (noise,) = kept_by(nn.Dropout(p), x)
    assert torch.equal(pack_dropout(noise, p, None).unpack(), noise)
    assert pack_dropout(noise, p, None).unpack().stride() == noise.stride()
    assert [t.nbytes for t in handed(pack_dropout, noise, p)] == [-(-noise.numel() // 8)]


def test_a_bool_mask_comes_back_from_one_bit_an_element() -> None:
    _, mask = torch.native_dropout(torch.randn(5, 7), 0.3, True)
    assert mask.dtype == torch.bool
    back = pack_dropout(mask, 0.3, None).unpack()
    assert back.dtype == torch.bool
    assert torch.equal(back, mask)
    assert [t.nbytes for t in handed(pack_dropout, mask, 0.3)] == [5]


def test_sizes_are_right_without_data() -> None:
    pool, shape = POOLS["stem"]
    with FakeTensorMode():
        x = torch.randn(shape, dtype=torch.bfloat16)
        indices, (noise,) = indices_of(pool, x), kept_by(nn.Dropout(0.1), x)
        packed = pack_indices(indices, x.shape, pool, None)
        back = packed.unpack()
        assert (back.shape, back.dtype) == (indices.shape, torch.int64)
        assert [t.nbytes for t in handed(pack_indices, indices, x.shape, pool)] == [-(-indices.numel() // 2)]
        assert [t.nbytes for t in handed(pack_dropout, noise, 0.1)] == [-(-noise.numel() // 8)]
        assert pack_dropout(noise, 0.1, None).unpack().shape == noise.shape
