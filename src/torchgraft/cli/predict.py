"""``torchgraft predict``: classify images with a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import emit_json, next_command, note, results_only, table
from .options import AdapterDir, AsJson, Device, Weights

if TYPE_CHECKING:
    from torchgraft.tasks import Prediction

EXAMPLES = """\
torchgraft predict runs/photos/adapter cat.jpg dog.jpg
torchgraft predict runs/photos/adapter new_photos/ --top 3
torchgraft predict runs/photos/adapter new_photos/ --out predictions.png    a picture of the answers
torchgraft predict runs/photos/adapter cat.jpg --json"""

OVERLAY = 60
"""Images on the picture of ``--out``: more cannot be read on one page."""


def run(
    adapter: AdapterDir,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files or folders of images.")],
    top: Annotated[int, typer.Option("--top", metavar="K", min=1, help="How many classes of each image to name.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.png", help="Draw the images with their classes into a file."),
    ] = None,
    weights: Weights = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Classify images with a trained adapter.

    The exit code is 2 if one of the images cannot be read; the others are classified all the same.
    """
    with results_only(as_json):
        from torchgraft.errors import GraftError
        from torchgraft.tasks import predict

        if out is not None and out.suffix.lower() != ".png":
            raise GraftError(f"--out {out}: the picture is a PNG file; use {out.with_suffix('.png')}")
        answers = predict(adapter, images, top=top, weights=weights, device=device or "auto")
        readable = [answer for answer in answers if answer.error is None]
        if out is not None and readable:
            _draw(readable, out)
    if as_json:
        emit_json([answer.to_dict() for answer in answers])
    elif readable:
        _show(readable)
        if out is None:
            command = f"torchgraft predict {adapter} IMAGE... --out FILE.png"
            next_command("Draw the answers into a picture:", command)
    for answer in answers:
        if answer.error is not None:
            note(f"error: {answer.error}")
    if len(readable) < len(answers):
        raise typer.Exit(2)


def _show(answers: list[Prediction]) -> None:
    from torchgraft.tasks.quantities import percent

    table(
        ("image", "class", "confidence"),
        [
            (answer.path if rank == 0 else "", name, percent(share))
            for answer in answers
            for rank, (name, share) in enumerate(answer.top)
        ],
        right=("confidence",),
    )


def _draw(readable: list[Prediction], out: Path) -> None:
    from torchgraft.data import open_image
    from torchgraft.tasks.plots import image_grid, save
    from torchgraft.tasks.quantities import percent

    shown = readable[:OVERLAY]
    pictures = [open_image(Path(answer.path)) for answer in shown]
    captions = [answer.top[0][0] for answer in shown]
    notes = [f"{percent(answer.top[0][1])} · {Path(answer.path).name}" for answer in shown]
    save(image_grid(pictures, captions, notes), out)
    note(f"wrote {out}" + (f" with the first {OVERLAY} images" if len(readable) > OVERLAY else ""))
