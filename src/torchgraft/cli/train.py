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
            ("report", result.out / "report.html"),
        ]
    )
    next_command(
        "Use it:",
        f"torchgraft predict {result.out / 'adapter'} IMAGE...",
        f"torchgraft eval {result.out} {result.data}",
    )
