"""Training a classifier from a `TrainConfig`: data, backbone, adapter, Lightning's Trainer, run folder.

A killed run goes on with ``resume=True`` and ends with the very same adapter bits as one that was never
killed (on the same machine), because the order and augmentation of images and the draws of every step are
functions of seed and position (see `torchgraft.tasks.batches`), and the rest is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from torch import nn

from .. import core
from ..backbones import create_backbone
from ..core import Adapter
from ..data import ClassificationData, ImageDataset, Transforms, load_data, transforms_for
from .arithmetic import trainer_precision
from .batches import ADAPTER, BACKBONE, Batches, eval_batch_size, seed_everything
from .budget import budget
from .checkpoints import (
    AtomicCheckpointIO,
    Patience,
    RunCheckpoints,
    StepLimit,
    read_checkpoint,
)
from .classification import ClassificationTask
from .config import TrainConfig
from .devices import check_devices, is_first_process, pick_device
from .history import History, peak_cuda_mb, peak_rss_mb
from .inference import Classifier, mistakes, predict_logits
from .metrics import Report, report
from .prefix_cache import check_cache_settings, prefix_cache
from .progress import ProgressDisplay
from .results import RunResult, read_result
from .runs import RunFolder, check_same_data, describe_environment, run_folder, write_json
from .surroundings import EventFiles, deterministic, orderly_errors, quiet_lightning


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True) -> RunResult:
    """Train an adapter, write the run folder and score the result on the held-out part.

    Args:
        config: All settings; `torchgraft.tasks.configure` makes one from a recipe and options.
        resume: Go on with the run in ``config.out``: from its last checkpoint if it was interrupted, at once
            with its result if it has finished, from the start if there is none.
        overwrite: Replace a run that is in ``config.out``.
        progress: Show progress on standard error.

    Returns:
        What is in ``summary.json``.

    Raises:
        GraftError: A setting, the data, the weights, the device or the folder is not usable; or the loss
            became NaN or infinite.
    """
    folder = run_folder(config, resume=resume)
    leader = is_first_process()
    if leader:
        folder.check(config, resume=resume, overwrite=overwrite)
        if resume and folder.summary.is_file():
            return read_result(folder.summary)
    if resume:
        config = folder.settled(config)
    device = pick_device(config.device)
    check_devices(device, config.devices)
    # A combination that makes no sense is told before the images are read.
    trainer_precision(config, device)
    check_cache_settings(config)
    with isolate_rng(), deterministic(config.deterministic):
        job = _prepare(config)
        if leader:
            folder.create(config, resume=resume)
            _describe(folder, job, resume=resume)
        with _from_cache(job, folder, device, progress=progress) as source:
            run = _fit(source, folder, device, resume=resume, progress=progress)
        return _finish(job, folder, device, run)


@dataclass(frozen=True)
class _Job:
    """Everything that is made before training starts; ``config.channels_last`` is decided."""

    config: TrainConfig
    data: ClassificationData
    transforms: Transforms
    model: nn.Module
    adapter: Adapter
    backbone_params: int

    @property
    def held_out(self) -> tuple[str, ImageDataset]:
        """Name and images of the part that the result is scored on."""
        return ("test", self.data.test) if self.data.test is not None else ("val", self.data.val)


@dataclass(frozen=True)
class _Fit:
    """What the Trainer left behind."""

    history: History
    checkpoints: RunCheckpoints
    steps: int
    saved_bytes: int | None
    stopped_early: bool


def _prepare(config: TrainConfig) -> _Job:
    core.method(config.method)  # a misspelt method is told before the images are read
    data = load_data(
        config.data,
        seed=config.seed,
        shots=config.shots,
        strict=config.strict,
        val_fraction=config.val_fraction,
    )
    model = _backbone(config)
    mirror = data.mirror if config.mirror is None else config.mirror
    transforms = transforms_for(model, image_size=config.image_size, mirror=mirror, augment=config.augment)
    # The backbone's own classifier is replaced by the adapter's head, so it does not count.
    backbone_params = sum(p.numel() for p in model.parameters()) - _classifier_size(model)
    seed_everything(ADAPTER, config.seed)
    adapter = _attach(model, config, len(data.classes), config.lean)
    if config.channels_last is None:
        config = config.model_copy(update={"channels_last": core.prefers_channels_last(model)})
    if config.frozen_dtype != "fp32":
        core.cast_frozen(model, config.frozen_dtype)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return _Job(config, data, transforms, model, adapter, backbone_params)


def _attach(model: nn.Module, config: TrainConfig, classes: int, lean: str) -> Adapter:
    return core.attach(
        model,
        config.method,
        num_classes=classes,
        include=config.include,
        exclude=config.exclude,
        batchnorm=config.batchnorm,
        lean=lean,
        fold=config.fold,
    )


def _backbone(config: TrainConfig) -> nn.Module:
    # Random weights (pretrained=False) must come back when the adapter is loaded.
    seed_everything(BACKBONE, config.seed)
    return create_backbone(
        config.backbone, weights=config.weights, pretrained=config.pretrained, image_size=config.image_size
    )


def _describe(folder: RunFolder, job: _Job, *, resume: bool) -> None:
    parts = {"train": job.data.train, "val": job.data.val, "test": job.data.test}
    ids = {name: part.ids for name, part in parts.items() if part is not None}
    environment = describe_environment(job.config.seed, ids)
    if resume and folder.environment.is_file():
        check_same_data(folder.environment, environment)
        return
    write_json(folder.environment, environment)
    if job.config.shots is not None:
        write_json(folder.train_ids, job.data.train.ids)


@contextlib.contextmanager
def _from_cache(job: _Job, folder: RunFolder, device: torch.device, *, progress: bool) -> Iterator[_Job]:
    """The job on kept activations instead of images, where that is asked for; the model takes them inside."""
    if not job.config.cache_prefix:
        yield job
        return
    console = Console(stderr=True) if progress and is_first_process() else None
    with prefix_cache(job.model, job.data, job.transforms, job.config, folder.prefix_cache, device, console) as cached:
        yield replace(job, data=cached.data, transforms=cached.transforms, config=cached.config)


def _fit(job: _Job, folder: RunFolder, device: torch.device, *, resume: bool, progress: bool) -> _Fit:
    config = job.config
    length = budget(len(job.data.train), config)
    task = ClassificationTask(job.model, job.adapter, len(job.data.classes), config, length.steps)
    loaders = Batches(job.data.train, job.data.val, job.transforms.train, job.transforms.eval, config, length.passes)
    history = History(folder.metrics)
    checkpoints = RunCheckpoints(folder.checkpoints, config.monitor, config.checkpoint_every)
    patience = [Patience(config.monitor, config.early_stopping)] if config.early_stopping else []
    limit = [StepLimit(config.max_steps)] if config.max_steps else []
    display = [ProgressDisplay(history, length.steps)] if progress else []
    restart = checkpoints.last_path if resume and checkpoints.last_path.is_file() else None
    if restart is not None:
        read_checkpoint(restart)
    with quiet_lightning(), orderly_errors():
        trainer = L.Trainer(
            accelerator=device.type,
            devices=config.devices,
            strategy=config.strategy,
            precision=trainer_precision(config, device),
            max_epochs=length.epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.grad_clip,
            callbacks=[history, *display, *patience, *limit, checkpoints],
            logger=EventFiles(folder.path),
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            default_root_dir=folder.path,
            log_every_n_steps=1,
        )
        trainer.fit(task, datamodule=loaders, ckpt_path=restart, weights_only=True)
    stopped = bool(patience) and patience[0].wait_count >= patience[0].patience
    return _Fit(history, checkpoints, trainer.global_step, task.saved_bytes, stopped)


def _finish(job: _Job, folder: RunFolder, device: torch.device, run: _Fit) -> RunResult:
    config, adapter = job.config, job.adapter
    best_epoch = run.history.rows[-1]["epoch"]
    if (config.keep or ("best" if config.early_stopping else "last")) == "best":
        adapter.load_state_dict(read_checkpoint(run.checkpoints.best_path)["state_dict"])
        best_epoch = run.checkpoints.best_epoch
    classes = job.data.classes
    model = job.model
    if config.frozen_dtype != "fp32":
        model, adapter = _on_stored_backbone(job)
    model.eval().to(device)
    classifier = Classifier(
        model, adapter, classes, job.transforms.eval, {}, device, channels_last=bool(config.channels_last)
    )
    part, held_out = job.held_out
    scores, logits = _score(classifier, held_out, config)
    val = scores if part == "val" else _score(classifier, job.data.val, config)[0]
    head, adapted = adapter.head_parameters(), adapter.num_parameters()
    if is_first_process():
        adapter.save(folder.adapter, task=_task_record(job, part, scores, val.accuracy))
    result = RunResult(
        out=folder.path,
        data=job.data.name,
        backbone=config.backbone,
        method=config.method,
        accuracy=scores.accuracy,
        top5=scores.top5,
        loss=scores.loss,
        part=part,
        val_accuracy=val.accuracy,
        classes=list(classes),
        per_class=scores.per_class,
        confusion=scores.confusion,
        worst=mistakes(logits, torch.tensor(held_out.labels), held_out.ids, classes),
        trainable_params=adapted + head,
        adapter_params=adapted,
        head_params=head,
        backbone_params=job.backbone_params,
        adapter_bytes=sum(f.stat().st_size for f in folder.adapter.rglob("*") if f.is_file()),
        train_images=len(job.data.train),
        val_images=len(job.data.val),
        test_images=len(held_out),
        skipped=len(job.data.skipped),
        epochs=len(run.history.rows),
        steps=run.steps,
        best_epoch=int(best_epoch or 0),
        seconds=run.history.rows[-1]["seconds"],
        images_per_second=statistics.median(row["images_per_second"] for row in run.history.rows),
        peak_rss_mb=peak_rss_mb(),
        peak_cuda_mb=peak_cuda_mb(),
        stopped_early=run.stopped_early,
        history=run.history.rows,
        lean=config.lean,
        frozen_dtype=config.frozen_dtype,
        saved_bytes=run.saved_bytes,
    )
    if is_first_process():
        write_json(folder.summary, result.to_dict())
    return result


def _on_stored_backbone(job: _Job) -> tuple[nn.Module, Adapter]:
    """The result on the backbone as it is stored, where whoever loads the adapter will use it: not rounded."""
    model = _backbone(job.config)
    adapter = _attach(model, job.config, len(job.data.classes), "off")
    adapter.load_state_dict(job.adapter.state_dict())
    return model.to(memory_format=torch.channels_last) if job.config.channels_last else model, adapter


def _score(classifier: Classifier, images: ImageDataset, config: TrainConfig) -> tuple[Report, torch.Tensor]:
    logits = predict_logits(classifier, images, batch_size=eval_batch_size(config), workers=config.workers or 0)
    return report(logits, torch.tensor(images.labels)), logits


def _task_record(job: _Job, part: str, scores: Report, val_accuracy: float) -> dict[str, Any]:
    """What ``task.json`` says: enough to rebuild the classifier and to know how good it was."""
    config = job.config
    weights = config.weights
    if weights is not None and Path(weights).expanduser().exists():
        weights = str(Path(weights).expanduser().resolve())
    return {
        "task": "classification",
        "classes": list(job.data.classes),
        "backbone": {
            "name": config.backbone,
            "weights": weights,
            "pretrained": config.pretrained,
            "image_size": config.image_size,
            "seed": config.seed,
        },
        "transform": job.transforms.config,
        "data": {
            "name": config.data,
            "seed": config.seed,
            "val_fraction": config.val_fraction,
            "shots": config.shots,
        },
        "metrics": {
            "part": part,
            "accuracy": scores.accuracy,
            "loss": scores.loss,
            "val_accuracy": val_accuracy,
        },
    }


def _classifier_size(model: nn.Module) -> int:
    """Parameters of the backbone's own classifier, by timm's ``get_classifier``."""
    get = getattr(model, "get_classifier", None)
    classifier = get() if callable(get) else None
    return sum(p.numel() for p in classifier.parameters()) if isinstance(classifier, nn.Module) else 0
