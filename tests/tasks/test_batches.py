from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.data import load_data
from torchgraft.tasks.batches import Batches, EpochBatches, SeededImages, seed_everything

sizes = st.integers(1, 200)
batch_sizes = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(size=sizes, batch_size=batch_sizes, passes=st.integers(1, 3), epoch=st.integers(0, 5))
def test_every_image_appears_once_a_pass_in_batches_of_even_size(size, batch_size, passes, epoch):
    batches = EpochBatches(size, batch_size, 1, passes=passes)
    batches.set_epoch(epoch)
    drawn = list(batches)
    assert len(drawn) == len(batches)
    numbers = range(epoch * passes, (epoch + 1) * passes)
    expected = [(number, index) for number in numbers for index in range(size)]
    assert sorted(key for batch in drawn for key in batch) == expected
    assert all(len({number for number, _ in batch}) == 1 for batch in drawn)
    lengths = [len(batch) for batch in drawn]
    assert max(lengths) <= batch_size
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=40, deadline=None)
@given(size=sizes, batch_size=batch_sizes, start=st.integers(0, 50), epoch=st.integers(0, 3), passes=st.integers(1, 3))
def test_resuming_inside_an_epoch_gives_its_remaining_batches_and_whole_epochs_after_it(
    size, batch_size, start, epoch, passes
):
    whole, rest = (EpochBatches(size, batch_size, 1, passes=passes) for _ in range(2))
    rest.resume_at(epoch, start)
    for number in (epoch, epoch + 1):
        whole.set_epoch(number)
        rest.set_epoch(number)
        assert list(rest) == list(whole)[start if number == epoch else 0 :]
        assert len(rest) == len(whole)


def test_the_order_depends_on_seed_and_epoch():
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            batches = EpochBatches(30, 8, seed)
            batches.set_epoch(epoch)
            orders.add(tuple(index for batch in batches for _, index in batch))
    assert len(orders) == 9


@settings(max_examples=40, deadline=None)
@given(size=st.integers(3, 100), batch_size=batch_sizes, world=st.integers(2, 3))
def test_devices_take_equal_shares_and_together_see_every_image(size, batch_size, world):
    ranks = [list(EpochBatches(size, batch_size, 0, rank, world)) for rank in range(world)]
    for together in zip(*ranks, strict=True):
        assert len({len(batch) for batch in together}) == 1
    assert {index for batches in ranks for batch in batches for _, index in batch} == set(range(size))


def test_an_image_is_augmented_the_same_whatever_was_drawn_before(pictures):
    data = load_data(str(pictures))
    noisy = SeededImages(data.train, lambda image: torch.rand(3) + random.random() + np.random.rand(), seed=4)
    first, label = noisy[2, 5]
    torch.rand(7), random.random(), noisy[0, 1]
    again, same = noisy[2, 5]
    assert torch.equal(first, again)
    assert label == same
    assert not torch.equal(first, noisy[3, 5][0])
    assert not torch.equal(first, noisy[2, 6][0])
    assert not torch.equal(first, SeededImages(data.train, noisy.transform, seed=5)[2, 5][0])


def test_seeding_covers_python_numpy_and_torch():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(1, 2, 3)
    first = draw()
    draw()
    seed_everything(1, 2, 3)
    assert draw() == first
    seed_everything(1, 2, 4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_loaders_leave_the_global_generators_alone(pictures, tiny):
    data = load_data(str(pictures))
    loaders = Batches(data.train, data.val, lambda image: torch.zeros(1), lambda image: torch.zeros(1), tiny())
    before = torch.get_rng_state()
    iter(loaders.train_dataloader())
    for _ in loaders.val_dataloader():
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_processes_change_nothing(pictures, tiny):
    data = load_data(str(pictures))

    def epoch(workers: int) -> list[torch.Tensor]:
        loaders = Batches(data.train, data.val, draw_three, draw_three, tiny(workers=workers, batch_size=16))
        return [images for images, _ in loaders.train_dataloader()]

    assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(2), strict=True))


def draw_three(image: object) -> torch.Tensor:
    return torch.rand(3)
