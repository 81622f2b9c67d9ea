"""What ``bench sites`` says of a model."""

from __future__ import annotations

import pytest

from torchgraft.bench.sites import goals, inspect, measure, smallest
from torchgraft.errors import GraftError


def test_sites_that_run_and_what_was_placed_are_counted() -> None:
    (row,) = measure(["test_resnet"])
    assert row.attached and row.fires == row.sites > 0 and row.silent == 0
    assert row.result.startswith("4 spatial_conv")
    assert (row.stages, row.blocks, row.head) == (4, 4, "fc")
    assert row.twins == "list same, getter same"
    assert all(g.met for g in goals([row]))


def test_layers_that_are_never_called_are_fall_backs() -> None:
    row = inspect("", "eva02_tiny_patch14_224", "lora[targets=all]")
    assert row.fires is not None and row.fires < row.sites
    assert row.fallbacks > 0 and row.silent == 0, row.result


def test_a_refusal_is_told() -> None:
    row = inspect("", "test_vit", "vpt-deep[num_tokens=0]")
    assert not row.attached and "num_tokens" in row.result


def test_of_every_file_the_smallest_variant_is_taken() -> None:
    assert list(smallest("starnet")) == [("starnet", "starnet_s050")]


def test_an_unknown_model_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(GraftError, match=r"'test_resnet9'.*test_resnet"):
        measure(["test_resnet9"])
