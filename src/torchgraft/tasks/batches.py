"""The order and the augmentation of training images as a pure function of (seed, pass, index).

Nothing here depends on what ran before, on the number of loader processes or on the state of any random
generator. So a run that was killed and resumed sees the same pixels in the same order as one that was not:
the position (epoch, batch) is all there is to save.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import ImageDataset
from .config import TrainConfig

Transform = Callable[[Any], Tensor]

# First word of the seed of each kind of draw, so that no two kinds share a stream.
ORDER, IMAGE, STEP, ADAPTER, BACKBONE = range(5)


def seed_everything(*entropy: int, devices: bool = True) -> None:
    """Seed Python, NumPy and PyTorch from a tuple of integers.

    Args:
        entropy: What the draws shall depend on, for example the run's seed and the step.
        devices: Also seed the generators of CUDA and MPS, not only the processor's.
    """
    state = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]) % 2**32)
    seed_torch = torch.manual_seed if devices else torch.default_generator.manual_seed
    seed_torch(int(state[0] >> np.uint64(1)))


class SeededImages(Dataset):
    """Images whose random transform is seeded by (seed, pass, index).

    Args:
        images: Untransformed images with their class numbers.
        transform: Random transform, image to tensor (3, S, S).
        seed: The run's seed.
    """

    def __init__(self, images: ImageDataset, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        number, index = key
        image, label = self.images[index]
        # Images are made on the processor; seeding a device for each of them would cost more than the image.
        seed_everything(IMAGE, self.seed, number, index, devices=False)
        return self.transform(image), label


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (pass, index) in an order fixed by (seed, pass), from any batch of any epoch on.

    All images appear once a pass, and an epoch is one pass or several. The batches are of equal size up to one
    image, so that the last one is never a handful of images with the weight of a full step. With several
    devices each takes every ``world_size``-th image of a batch; a batch that does not divide is filled up with
    its own first images.

    Args:
        size: Number of images.
        batch_size: Images a batch and device, at most.
        seed: The run's seed.
        rank: This device's number.
        world_size: Number of devices.
        passes: Passes an epoch.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, passes: int = 1
    ) -> None:
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.batches = -(-size // (batch_size * world_size))
        self.passes = passes
        self.epoch = 0
        self._resume = (0, 0)

    def resume_at(self, epoch: int, batch: int) -> None:
        """Go to batch ``batch`` of epoch ``epoch``; later epochs start at their first batch."""
        self.epoch, self._resume = epoch, (epoch, batch)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.passes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        skipped = self._resume[1] if self.epoch == self._resume[0] else 0
        start = self.epoch * self.passes
        for number in range(start + skipped // self.batches, start + self.passes):
            order = np.random.Generator(np.random.PCG64([ORDER, self.seed, number])).permutation(self.size)
            first = max(0, skipped - (number - start) * self.batches)
            for batch in np.array_split(order, self.batches)[first:]:
                share = -(-len(batch) // self.world_size)
                filled = np.resize(batch, share * self.world_size)
                yield [(number, int(index)) for index in filled[self.rank :: self.world_size]]


class Batches(L.LightningDataModule):
    """Loaders of the training and validation images; its state in a checkpoint is the position.

    Args:
        train: Untransformed training images.
        val: Untransformed images for model selection.
        train_transform: Random transform of training images.
        eval_transform: Transform of all other images.
        config: Batch size, seed and workers.
        passes: Passes over the training images an epoch.
    """

    def __init__(
        self,
        train: ImageDataset,
        val: ImageDataset,
        train_transform: Transform,
        eval_transform: Transform,
        config: TrainConfig,
        passes: int = 1,
    ) -> None:
        super().__init__()
        self.train_images = SeededImages(train, train_transform, config.seed)
        self.val_images = val.with_transform(eval_transform)
        self.config, self.passes = config, passes
        self._position = (0, 0)
        self._batches: EpochBatches | None = None

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented training batches, starting at the restored position."""
        rank, world = self._place()
        size, config = len(self.train_images), self.config
        batches = EpochBatches(size, config.batch_size, config.seed, rank, world, self.passes)
        batches.resume_at(*self._position)
        self._batches = batches
        return loader(self.train_images, self.config, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        """Every validation image once, each device its share."""
        rank, world = self._place()
        images = self.val_images.subset(list(range(rank, len(self.val_images), world)))
        return loader(images, self.config, batch_size=eval_batch_size(self.config))

    def start_epoch(self, epoch: int) -> None:
        """Tell the training order which epoch begins."""
        if self._batches is not None:
            self._batches.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """The position that training would go on from: epoch and batch, both counted from 0."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        progress: Any = loop.epoch_progress.current
        epoch = progress.processed
        inside = progress.started > epoch
        return {"epoch": epoch, "batch": loop.epoch_loop.batch_progress.current.ready if inside else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a saved position."""
        self._position = (int(state_dict["epoch"]), int(state_dict["batch"]))

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def loader(dataset: Dataset, config: TrainConfig, **options: Any) -> DataLoader:
    """A loader whose processes and memory suit the device; it draws nothing from the global generators."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    workers = config.workers
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if cuda else 0
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=cuda,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
        **options,
    )


def eval_batch_size(config: TrainConfig) -> int:
    """Images a batch where no gradient is kept: larger than in training, the same result."""
    return max(32, config.batch_size)
