"""``torchgraft train``: train an adapter on a folder of images."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import emit_json, next_command, pairs, results_only, say
from .failures import Interrupted
from .options import AsJson, Data, Device, ImageSize, Weights

EXAMPLES = """\
torchgraft train photos/ --backbone convnext_tiny --method conv-adapter
torchgraft train photos/ --method "conv-adapter[reduction=8]" --epochs 20 --lr 0.002 --out runs/photos
torchgraft train photos/ --frozen-dtype bf16 --lean recompute     in less memory
torchgraft train photos/ --include "blocks[4:]" --augment none --cache-prefix   nothing runs twice for an image
torchgraft train photos/ --shots 16 --seed 1        sixteen images of each class
torchgraft train sample:counting --image-size 96    a data set that comes along
torchgraft train photos/ --recipe mine.yaml -o weight_decay=0.01 -o schedule=constant
torchgraft train photos/ --out runs/photos --resume"""


def run(
    data: Data,
    backbone: Annotated[
        str | None, typer.Option("--backbone", metavar="NAME", help="A timm or torchgraft backbone.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="METHOD", help="Method with options: NAME[KEY=VALUE].")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the images.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Images in one step.")] = None,
    image_size: ImageSize = None,
    lean: Annotated[
        str | None,
        typer.Option(
            "--lean",
            metavar="LEVEL",
            help="What frozen layers keep for the backward. exact (default): what gradients need, bit-identical"
            " gradients. recompute: bit-identical, normalisation and MLPs computed twice. checkpoint: bit-identical,"
            " whole blocks computed twice. compact: 8-bit derivatives, bounded error. off: all. torchgraft plan"
            " BACKBONE --json tells the bytes of each.",
        ),
    ] = None,
    frozen_dtype: Annotated[
        str | None,
        typer.Option(
            "--frozen-dtype",
            metavar="TYPE",
            help="fp32 (default), bf16 or fp16 for frozen weights and activations; what trains is fp32 always.",
        ),
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last/--no-channels-last", help="Channels-last memory; default: by the architecture."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="SITES", help="Adapt these only: path, glob or address; can be repeated."),
    ] = None,
    augment: Annotated[
        str | None, typer.Option("--augment", metavar="KIND", help="light (default), standard or none.")
    ] = None,
    cache_prefix: Annotated[
        bool,
        typer.Option(
            "--cache-prefix",
            help="Compute what lies below the first trained site once per image and keep it; with --augment none.",
        ),
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache-dir", metavar="DIR", help="Where to keep it, for several runs; default: the run folder."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", metavar="K", help="Use K training images of each class.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Start of all random choices.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder; default: a new one in runs/.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE", help="Settings from a YAML file or bundled recipe."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", metavar="KEY=VALUE", help="Any other setting; can be given repeatedly."),
    ] = None,
    weights: Weights = None,
    no_pretrained: Annotated[
        bool, typer.Option("--no-pretrained", help="Start from random weights (for tests).")
    ] = False,
    device: Device = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at an unreadable image instead of leaving it out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter for DATA on a frozen backbone.

    The classes come from the data, the transforms from the backbone and all other settings from the recipe of
    the method. Settings given here win over --recipe, which wins over the method's recipe.
    """
    given: dict[str, Any] = {
        "backbone": backbone,
        "method": method,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "image_size": image_size,
        "lean": lean,
        "frozen_dtype": frozen_dtype,
        "channels_last": channels_last,
        "include": include or None,
        "augment": augment,
        "cache_prefix": True if cache_prefix else None,
        "cache_dir": cache_dir,
        "shots": shots,
        "seed": seed,
        "out": out,
        "weights": None if weights is None else str(weights),
        "pretrained": False if no_pretrained else None,
        "device": device,
        "strict": True if strict else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    with results_only(as_json):
        from torchgraft.errors import GraftError
        from torchgraft.tasks import configure, parse_options
        from torchgraft.tasks import train as run_training
        from torchgraft.tasks.report import write_report
        from torchgraft.tasks.runs import run_folder

        more = parse_options(option or [])
        if twice := sorted(given.keys() & more.keys()):
            raise GraftError(f"{twice[0]} is set twice, by --{twice[0].replace('_', '-')} and by -o; leave one out")
        config = configure(data, recipe=recipe, **given, **more)
        folder = run_folder(config, resume=resume).path
        try:
            result = run_training(config.model_copy(update={"out": folder}), resume=resume, overwrite=overwrite)
            if not _is_first_process():
                return
            write_report(result, folder)
        except KeyboardInterrupt:
            raise Interrupted(f"continue with: {_resume_command(folder)}") from None
    if as_json:
        emit_json(result.to_dict())
    else:
        _show(result)


def _resume_command(folder: Path) -> str:
    given = [word for word in sys.argv[1:] if word not in {"--resume", "--overwrite"}]
    named = any(word == "--out" or word.startswith("--out=") for word in given)
    return shlex.join(["torchgraft", *given, *([] if named else ["--out", str(folder)]), "--resume"])


def _is_first_process() -> bool:
    """Whether this process speaks for the run: data parallel training starts the same command many times."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def _kept(result: Any) -> list[tuple[str, str]]:
    """The row about what a batch keeps for the backward; none where no batch was counted."""
    from torchgraft.tasks.quantities import size

    if result.saved_bytes is None:
        return []
    return [("kept for the backward", f"{size(result.saved_bytes)} a batch (lean: {result.lean})")]


def _show(result: Any) -> None:
    from torchgraft.tasks.quantities import duration, interval, percent, size

    low, high = interval(result.accuracy, result.test_images)
    share = percent(result.trainable_params / max(1, result.backbone_params))
    say()
    pairs(
        [
            (
                f"{result.part} accuracy",
                f"{percent(result.accuracy)} of {result.test_images:,} images"
                f" (95% interval {percent(low)} to {percent(high)})",
            ),
            ("trained", f"{result.trainable_params:,} parameters, {share} of the backbone"),
            ("adapter on disk", size(result.adapter_bytes)),
            ("time", duration(result.seconds)),
            ("peak memory", size(result.peak_rss_mb * 1e6)),
            *_kept(result),
            ("report", result.out / "report.html"),
        ]
    )
    next_command(
        "Use it:",
        f"torchgraft predict {result.out / 'adapter'} IMAGE...",
        f"torchgraft eval {result.out} {result.data}",
    )
