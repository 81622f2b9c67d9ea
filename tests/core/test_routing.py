from __future__ import annotations

import pytest
import torch
from torch import nn

import torchgraft as tg

from ..methods.networks import images, tiny, train_step


@pytest.fixture
def model() -> nn.Module:
    """A network with two adapters whose heads differ in size."""
    network = tiny("test_resnet")
    for name, classes in (("five", 5), ("seven", 7)):
        train_step(tg.attach(network, "lora", num_classes=classes, name=name))
    return network


def _apart(model: nn.Module, names: list[str], x: torch.Tensor) -> list[torch.Tensor]:
    rows = []
    for i, row in enumerate(x):
        tg.activate(model, names[i * len(names) // len(x)])
        rows.append(model(row[None])[0])
    return rows


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_rows_folded_into_a_batch_go_to_the_adapter_of_their_name_and_keep_their_order(model, rows) -> None:
    names, x = ["seven", "five"], images(rows)
    wanted = _apart(model, names, x)
    with tg.route(model, names):
        found = model(x)
    assert [len(row) for row in found] == [7] * (rows // 2) + [5] * (rows // 2)
    for ours, apart in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, apart, rtol=1e-4, atol=1e-5)


def test_a_batch_that_the_names_do_not_divide_is_refused(model) -> None:
    with tg.route(model, ["five", "seven"]), pytest.raises(tg.GraftError, match="one name per row"):
        model(images(3))
