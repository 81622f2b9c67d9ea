from __future__ import annotations

import pytest
import torch

from torchgraft.errors import GraftError
from torchgraft.tasks.denseclip import ConvProjector, DenseAttentionPool, resize_positions


def test_a_position_table_of_the_right_size_is_returned_as_it_is() -> None:
    table = torch.randn(17, 8)
    assert resize_positions(table, (4, 4)) is table


def test_resizing_keeps_the_class_token_and_a_constant_grid() -> None:
    table = torch.cat([torch.full((1, 8), 5.0), torch.full((16, 8), 2.0)])
    resized = resize_positions(table, (3, 7))
    assert resized.shape == (22, 8)
    assert torch.equal(resized[0], table[0])
    torch.testing.assert_close(resized[1:], torch.full((21, 8), 2.0))


def test_a_table_without_a_square_grid_is_refused() -> None:
    with pytest.raises(GraftError, match="12 rows"):
        resize_positions(torch.zeros(12, 8), (2, 2))


def test_crop_or_resize_crops_small_maps_and_resizes_large_ones() -> None:
    pool = DenseAttentionPool(4, 16, 2, 8)
    small, large = torch.randn(1, 16, 3, 2), torch.randn(1, 16, 5, 3)
    resized, outputs = {}, {}
    for mode in ("resize", "crop", "crop_or_resize"):
        pool.pos_mode = mode
        outputs[mode] = pool(small)[1]
        if mode != "crop":
            resized[mode] = pool(large)[1]
    assert torch.equal(outputs["crop"], outputs["crop_or_resize"])
    assert not torch.allclose(outputs["crop"], outputs["resize"])
    assert torch.equal(resized["resize"], resized["crop_or_resize"])


def test_the_published_crop_refuses_a_map_larger_than_its_grid() -> None:
    pool = DenseAttentionPool(2, 16, 2, 8, pos_mode="crop")
    with pytest.raises(GraftError, match="3 x 2 is larger than the 2 x 2 grid"):
        pool(torch.randn(1, 16, 3, 2))


def test_an_unknown_position_mode_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(GraftError, match="pos_mode='bicubic'"):
        DenseAttentionPool(2, 16, 2, 8, pos_mode="bicubic")  # type: ignore[arg-type]
    with pytest.raises(GraftError, match="num_heads=3"):
        DenseAttentionPool(2, 16, 3, 8)


def test_the_convolution_pools_the_mean_of_its_dense_embeddings() -> None:
    pooled, dense = ConvProjector(16, 8)(torch.randn(2, 16, 3, 5))
    assert dense.shape == (2, 8, 3, 5)
    torch.testing.assert_close(pooled, dense.mean(dim=(2, 3)))
