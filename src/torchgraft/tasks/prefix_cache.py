"""The prefix cache of a run: what lies below the first trained site is computed once per image and read from then on.

``cache_prefix=True`` finds the cut (:func:`torchgraft.core.prefix.find_cut`), writes what goes through it for every
training and validation image into memory-mapped files, and trains from there. The files are found again by all that
they depend on (:mod:`torchgraft.tasks.prefix_origin`). The scores of a finished run are those of the whole network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..core.prefix import Cut, find_cut, from_cut, until_cut
from ..core.probe import in_eval_mode
from ..data import ClassificationData, ImageDataset, Transforms
from ..data.activations import ActivationDataset, ActivationFile
from ..errors import GraftError
from .arithmetic import trainer_precision
from .batches import eval_batch_size, loader
from .config import TrainConfig
from .prefix_origin import name_of, origin_of, what_changed, with_images
from .quantities import duration, size

_FILES = re.compile(r"\.?(train|val)-[0-9a-f]{16}\.(npy|json)(\..*\.part)?")
"""What a cache folder holds, files that a killed process left half written included."""
_SPARE = 1.02
"""Room that must be free, relative to what is written."""
_QUIET_SECONDS = 60.0
"""How long plain output is silent at most."""


@dataclasses.dataclass(frozen=True)
class Cached:
    """What a run trains on in place of images.

    Attributes:
        data: The data set; its training and validation part hold activations.
        transforms: Transforms that leave them as they are.
        config: The settings, for batches that are no images.
    """

    data: ClassificationData
    transforms: Transforms
    config: TrainConfig


def check_cache_settings(config: TrainConfig) -> None:
    """Refuse settings under which an image is another one in every epoch.

    Raises:
        GraftError: ``cache_prefix`` with random augmentation.
    """
    if config.cache_prefix and config.augment != "none":
        raise GraftError(
            f"cache_prefix: augment={config.augment!r} changes the images in every epoch, so nothing made of them "
            "can be kept; use --augment none, or train without --cache-prefix"
        )


@contextlib.contextmanager
def prefix_cache(
    model: nn.Module,
    data: ClassificationData,
    transforms: Transforms,
    config: TrainConfig,
    own_folder: Path,
    device: torch.device,
    console: Console | None = None,
) -> Iterator[Cached]:
    """Inside, ``model`` takes what is yielded instead of images; what is not in the folder yet is computed first.

    Args:
        model: The adapted model.
        data: The images.
        transforms: Their transforms, not random.
        config: Settings of the run; ``channels_last`` is decided.
        own_folder: The run's folder for the files, where those that are out of date are removed;
            ``config.cache_dir``, if given, takes its place, and nothing is removed there.
        device: Where to compute.
        console: Where to show what is computed and how far that is; None: nowhere.

    Raises:
        GraftError: There is nothing to keep, the disk has too little room, or a value does not fit the type.
    """
    folder = own_folder if config.cache_dir is None else config.cache_dir.expanduser()
    prefix = _Prefix(model.to(device), transforms, config, device)
    parts = {"train": data.train, "val": data.val}
    origins = {part: with_images(prefix.origin, images) for part, images in parts.items()}
    files = {
        part: ActivationFile(folder / f"{part}-{name_of(origins[part])}.npy", prefix.cut, prefix.dtype, len(images))
        for part, images in parts.items()
    }
    missing = [part for part, file in files.items() if not file.holds(origins[part])]
    say = _silent if console is None else _plain_lines(console)
    say(_summary(prefix, [*files.values()], folder))
    if config.cache_dir is None:
        for part in missing:
            if reason := what_changed(sorted(folder.glob(f"{part}-*.json")), origins[part]):
                say(f"{part} is computed again: {reason} changed")
        _remove_others(folder, [*files.values()])
    if missing:
        _check_room(folder, sum(files[part].bytes for part in missing))
    for part in missing:
        started = time.perf_counter()
        with prefix.running() as compute, _progress(part, len(files[part]), console) as done:
            files[part].write(_rows(compute, prefix.batches(part, parts[part]), done), origins[part])
        say(f"{part} computed in {duration(time.perf_counter() - started)}")
    if not missing:
        say("found from an earlier run, nothing to compute")
    kept = {part: ActivationDataset(files[part], images) for part, images in parts.items()}
    with from_cut(model, prefix.cut):
        yield Cached(
            dataclasses.replace(data, **kept),  # type: ignore[arg-type]
            Transforms(_unchanged, _unchanged, transforms.config),
            config.model_copy(update={"channels_last": False}),
        )


class _Prefix:
    """The part of a network below its cut, and how it runs."""

    def __init__(self, model: nn.Module, transforms: Transforms, config: TrainConfig, device: torch.device) -> None:
        self.model, self.transform, self.config, self.device = model, transforms.eval, config, device
        precision = trainer_precision(config, device)
        self.autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        image = torch.zeros(1, *transforms.config["input_size"], device=device)
        with self._arithmetic():
            self.cut: Cut = find_cut(model, ((self._laid_out(image),), {}))
        # A half type is kept as it is: the other one would lose some of it and need as much room.
        half = self.cut.dtype.itemsize <= 2
        self.dtype: torch.dtype = self.cut.dtype if half else getattr(torch, config.cache_dtype)
        arithmetic = {"device": device.type, "precision": precision, "channels_last": bool(config.channels_last)}
        self.origin = origin_of(model, self.cut, transforms, arithmetic, self.dtype)

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yields a function from images (N, 3, H, W) to activations at the cut."""
        with in_eval_mode(self.model), until_cut(self.model, self.cut) as prefix, self._arithmetic():
            yield lambda images: prefix(self._laid_out(images.to(self.device)))

    def batches(self, part: str, images: ImageDataset) -> Iterator[Tensor]:
        """The images in their order, in batches as large as those of the run, so that the same kernels are chosen."""
        count, config = len(images), self.config
        if part == "train":
            chunks = np.array_split(
                np.arange(count), -(-count // (config.batch_size * config.devices)) * config.devices
            )
        else:
            chunks = np.split(np.arange(count), range(eval_batch_size(config), count, eval_batch_size(config)))
        sampler = [chunk.tolist() for chunk in chunks if len(chunk)]
        for batch, _ in loader(images.with_transform(self.transform), config, batch_sampler=sampler):
            yield batch

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def _rows(
    compute: Callable[[Tensor], Tensor], batches: Iterator[Tensor], done: Callable[[int], None]
) -> Iterator[Tensor]:
    for batch in batches:
        yield compute(batch)
        done(len(batch))


def _unchanged(activation: Any) -> Tensor:
    return activation


def _summary(prefix: _Prefix, files: list[ActivationFile], folder: Path) -> str:
    count, total = sum(len(file) for file in files), sum(file.bytes for file in files)
    shape = " x ".join(map(str, prefix.cut.shape))
    kind = str(prefix.dtype).removeprefix("torch.")
    each = size(prefix.cut.bytes_per_image(prefix.dtype))
    return f"{prefix.cut}, {shape} in {kind}: {each} an image, {size(total)} for {count:,} images in {folder}"


def _check_room(folder: Path, needed: int) -> None:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed * _SPARE > free:
        raise GraftError(
            f"prefix cache: {size(needed)} are needed and {size(free)} are free in {place}; name a folder on another "
            "disk with --cache-dir, adapt later sites only, or train without --cache-prefix"
        )


def _remove_others(folder: Path, files: list[ActivationFile]) -> None:
    keep = {path for file in files for path in (file.path, file.path.with_suffix(".json"))}
    for path in folder.iterdir() if folder.is_dir() else ():
        if _FILES.fullmatch(path.name) and path not in keep:
            path.unlink(missing_ok=True)


def _silent(line: str) -> None:
    """Where nothing is shown."""


def _plain_lines(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(f"prefix cache: {line}", highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def _progress(part: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Yields what is told that so many more images are done: a bar with the time left, a line each minute, nothing."""
    if console is None:
        yield lambda count: None
        return
    if console.is_terminal:
        columns = (
            TextColumn("computing {task.description}"),
            BarColumn(None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(part, total=total)
            yield lambda count: bar.advance(task, count)
        return
    say, started, count = _plain_lines(console), time.perf_counter(), 0
    shown = started

    def line(more: int) -> None:
        nonlocal count, shown
        count, now = count + more, time.perf_counter()
        if now - shown >= _QUIET_SECONDS:
            shown = now
            say(f"{part} {count:,} of {total:,} images, {duration((now - started) / count * (total - count))} left")

    yield line
