from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.tasks import TrainConfig
from torchgraft.tasks.batches import EpochBatches
from torchgraft.tasks.budget import Budget, budget


@pytest.mark.parametrize(
    ("images", "changes", "expected"),
    [
        (320, {"epochs": 30}, Budget(1, 30, 600)),
        (320, {"epochs": 30, "max_steps": 110}, Budget(1, 6, 110)),
        (320, {"epochs": 2, "accumulate": 4}, Budget(1, 2, 10)),
        (320, {"epochs": 15, "min_epoch_steps": 16}, Budget(1, 15, 300)),
        (40, {"epochs": 15, "min_epoch_steps": 16}, Budget(6, 15, 270)),
        (5, {"epochs": 3, "max_steps": 100}, Budget(1, 3, 3)),
        (33, {"epochs": 3, "accumulate": 2}, Budget(1, 3, 6)),
        (40, {"epochs": 2, "min_epoch_steps": 5, "accumulate": 2}, Budget(4, 2, 12)),
        (320, {"epochs": 2, "devices": 2}, Budget(1, 2, 20)),
    ],
)
def test_lengths_by_hand(images, changes, expected):
    assert budget(images, TrainConfig(data="photos", batch_size=16, **changes)) == expected


@settings(max_examples=100, deadline=None)
@given(
    images=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    min_epoch_steps=st.integers(1, 30),
    max_steps=st.none() | st.integers(1, 300),
)
def test_the_length_agrees_with_the_batches_that_are_drawn(images, batch_size, min_epoch_steps, max_steps):
    config = TrainConfig(
        data="photos", epochs=4, batch_size=batch_size, min_epoch_steps=min_epoch_steps, max_steps=max_steps
    )
    length = budget(images, config)
    epoch_steps = len(EpochBatches(images, batch_size, 0, passes=length.passes))
    assert epoch_steps >= min_epoch_steps
    assert (length.epochs - 1) * epoch_steps < length.steps <= length.epochs * epoch_steps
    assert length.steps == min(4 * epoch_steps, max_steps or 10**9)
