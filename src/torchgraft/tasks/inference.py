"""Using a finished adapter: evaluate it on data, predict the classes of image files.

Everything is rebuilt from the adapter's folder: the backbone's name and weights, the classes and the
transform of the images. Nothing in it is executed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .. import core
from ..backbones import create_backbone
from ..core import Adapter
from ..data import IMAGE_SUFFIXES, ImageDataset, eval_transform_from, load_data, open_image
from ..errors import GraftError, nearest
from .batches import BACKBONE, seed_everything
from .devices import pick_device
from .metrics import report
from .results import EvalResult, Mistake, Prediction

WORST = 24
"""How many wrong predictions a result lists."""


@dataclass(frozen=True)
class Classifier:
    """A backbone with a finished adapter, ready to be used.

    Attributes:
        model: Images (N, 3, S, S) -> logits (N, K), in evaluation mode on its device.
        adapter: The adapter in it.
        classes: K class names.
        transform: PIL image -> normalised tensor (3, S, S).
        task: The contents of ``task.json``.
        device: Where the model lives.
        channels_last: Whether images go in with the channels last.
    """

    model: nn.Module
    adapter: Adapter
    classes: tuple[str, ...]
    transform: Any
    task: dict[str, Any]
    device: torch.device
    channels_last: bool = True

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K), on the processor, of a batch (N, 3, S, S)."""
        images = images.to(self.device)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images).float().cpu()


def adapter_folder(path: str | Path) -> Path:
    """The adapter's folder in ``path``, which may be a run folder or the adapter's folder itself.

    Raises:
        GraftError: There is no adapter.
    """
    path = Path(path).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    if not path.exists():
        raise GraftError(f"adapter: {path} does not exist; name a run folder or an adapter folder")
    if (path / "checkpoints").is_dir():
        raise GraftError(f"adapter: the run in {path} has not finished; resume it first")
    raise GraftError(f"adapter: {path} holds no adapter_config.json; name a run folder or an adapter folder")


def load_classifier(
    path: str | Path, *, weights: str | Path | None = None, device: str = "auto", channels_last: bool | None = None
) -> Classifier:
    """Rebuild the classifier that a training run saved.

    Args:
        path: Run folder or adapter folder.
        weights: Weights of the backbone, where they are not where they were in training.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        channels_last: Memory format of the model; None: by the architecture.

    Raises:
        GraftError: The folder is no classifier's, or the backbone's weights are not there.
    """
    folder = adapter_folder(path)
    task = core.read_task(folder)
    if task is None or task.get("task") != "classification":
        raise GraftError(f"{folder}: task.json is missing or is not a classification's; train it with torchgraft train")
    try:
        classes, backbone, transform = tuple(task["classes"]), dict(task["backbone"]), task["transform"]
        name, source = backbone["name"], backbone["weights"]
    except (KeyError, TypeError, ValueError) as error:
        raise GraftError(
            f"{folder / 'task.json'}: no entry {error}; the file is damaged or of another version"
        ) from error
    target = pick_device(device)
    with isolate_rng():
        seed_everything(BACKBONE, int(backbone.get("seed", 0)))
        model = create_backbone(
            name,
            weights=weights if weights is not None else source,
            pretrained=bool(backbone.get("pretrained", True)),
            image_size=backbone.get("image_size"),
        )
        adapter = core.load(model, folder)
    model.eval().to(target)
    if channels_last is None:
        channels_last = core.prefers_channels_last(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return Classifier(model, adapter, classes, eval_transform_from(transform), task, target, channels_last)


def evaluate(
    run_or_adapter: str | Path,
    data: str | None = None,
    *,
    part: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = 0,
    strict: bool = False,
) -> EvalResult:
    """Score a finished adapter on one part of a data set.

    Args:
        run_or_adapter: Run folder or adapter folder.
        data: What `torchgraft.data.load_data` takes; None: what the adapter was trained on.
        part: ``test``, ``val`` or ``train``; None: ``test`` where the data has one, else ``val``.
        weights: Weights of the backbone, where they are not where they were in training.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        batch_size: Images a batch.
        workers: Processes that load images.
        strict: Stop at an unreadable image instead of leaving it out.

    Raises:
        GraftError: No such adapter, data, part or device, or the data has classes that the adapter lacks.
    """
    classifier = load_classifier(run_or_adapter, weights=weights, device=device)
    recorded = classifier.task.get("data", {})
    loaded = load_data(
        data if data is not None else recorded["name"],
        seed=int(recorded.get("seed", 0)),
        val_fraction=float(recorded.get("val_fraction", 0.2)),
        strict=strict,
    )
    parts = {"train": loaded.train, "val": loaded.val, "test": loaded.test}
    part = part or ("test" if loaded.test is not None else "val")
    images = parts.get(part)
    if images is None or not len(images):
        raise GraftError(f"part {part!r}: {loaded.name} has no such images; {nearest(part, _filled(parts))}")
    strangers = sorted(set(loaded.classes) - set(classifier.classes))
    if strangers:
        raise GraftError(
            f"{loaded.name} has {len(strangers)} classes that the adapter does not know, such as"
            f" {strangers[0]!r}; {nearest(strangers[0], classifier.classes)}"
        )
    number = {name: index for index, name in enumerate(classifier.classes)}
    labels = torch.tensor([number[loaded.classes[label]] for label in images.labels])
    started = time.perf_counter()
    logits = predict_logits(classifier, images, batch_size=batch_size, workers=workers)
    scores = report(logits, labels)
    return EvalResult(
        data=loaded.name,
        part=part,
        n=len(images),
        accuracy=scores.accuracy,
        top5=scores.top5,
        loss=scores.loss,
        classes=list(classifier.classes),
        per_class=scores.per_class,
        confusion=scores.confusion,
        worst=mistakes(logits, labels, images.ids, classifier.classes),
        skipped=[(s.path, s.reason) for s in loaded.skipped],
        seconds=time.perf_counter() - started,
    )


def predict(
    adapter_dir: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    weights: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 32,
    workers: int = 0,
) -> list[Prediction]:
    """The most probable classes of image files.

    Args:
        adapter_dir: Run folder or adapter folder.
        images: Image files; a folder stands for all images in it and below, in the order of their names.
        top: How many classes an image, at most.
        weights: Weights of the backbone, where they are not where they were in training.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        batch_size: Images a batch.
        workers: Processes that load images.

    Returns:
        One prediction an image, in order; an unreadable image has an ``error`` and does not stop the others.

    Raises:
        GraftError: No such adapter, no images, or the backbone's weights are not there.
    """
    if top < 1:
        raise GraftError(f"top: {top} was given, expected 1 or more classes an image")
    paths = _image_files(images)
    if not paths:
        raise GraftError("predict: no image files were given or found in the folders")
    classifier = load_classifier(adapter_dir, weights=weights, device=device)
    loader = DataLoader(
        _Files(paths, classifier.transform), batch_size=batch_size, num_workers=workers, collate_fn=list
    )
    done: list[Prediction] = []
    for batch in loader:
        readable = [tensor for tensor, _ in batch if tensor is not None]
        rows = iter(classifier.logits(torch.stack(readable)).softmax(1) if readable else ())
        for _, error in batch:
            path = str(paths[len(done)])
            done.append(
                Prediction(path, [], error) if error else Prediction(path, _top(next(rows), classifier.classes, top))
            )
    return done


def predict_logits(classifier: Classifier, images: ImageDataset, *, batch_size: int = 32, workers: int = 0) -> Tensor:
    """Logits (N, K) of all images of a data set, in order."""
    loader = DataLoader(
        images.with_transform(classifier.transform),
        batch_size=batch_size,
        num_workers=workers,
        generator=torch.Generator(),
    )
    return torch.cat([classifier.logits(batch) for batch, _ in loader])


def mistakes(logits: Tensor, labels: Tensor, ids: Sequence[str], classes: Sequence[str]) -> list[Mistake]:
    """The wrong predictions, the most confident first, `WORST` at most.

    Args:
        logits: (N, K).
        labels: (N,), class numbers.
        ids: N image names.
        classes: K class names.
    """
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:WORST].tolist()
    return [Mistake(ids[i], classes[int(labels[i])], classes[int(predicted[i])], float(confidence[i])) for i in order]


class _Files(Dataset):
    """Image files as tensors; an unreadable one as None with the reason."""

    def __init__(self, paths: Sequence[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str | None]:
        try:
            return self.transform(open_image(self.paths[index])), None
        except GraftError as error:
            return None, str(error)


def _filled(parts: dict[str, ImageDataset | None]) -> list[str]:
    return [name for name, images in parts.items() if images is not None and len(images)]


def _image_files(images: Sequence[str | Path]) -> list[Path]:
    return [file for entry in images for file in _expand(Path(entry).expanduser())]


def _expand(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    else:
        yield path


def _top(probabilities: Tensor, classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    values, indices = probabilities.topk(min(top, len(classes)))
    return [(classes[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
