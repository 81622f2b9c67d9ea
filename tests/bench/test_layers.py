"""The table of layer kinds."""

from __future__ import annotations

import pytest
import torch

from torchgraft.bench.layers import LAYERS, row


@pytest.mark.parametrize("name", LAYERS)
def test_a_lean_layer_keeps_what_is_needed_and_no_more(name: str) -> None:
    found = row(name)
    assert found.goal().met, found
    assert found.needed <= found.lean * 1.0001 + 1e-9, "less than is needed cannot be right"
    assert found.lean <= found.plain * 1.0001


@pytest.mark.parametrize("name", ["Conv2d 3x3", "BatchNorm2d, eval", "AvgPool2d", "ReLU"])
def test_the_installed_torch_keeps_a_whole_tensor_where_less_would_do(name: str) -> None:
    assert row(name).plain == pytest.approx(1.0)


def test_bytes_are_relative_to_the_input_in_its_own_type() -> None:
    assert row("GELU", torch.bfloat16).plain == row("GELU").plain == 1.0
    assert row("ReLU", torch.bfloat16).needed == 2 * row("ReLU").needed


def test_channels_last_changes_nothing() -> None:
    assert row("ReLU6", channels_last=True) == row("ReLU6")
