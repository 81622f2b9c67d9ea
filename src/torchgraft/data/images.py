"""Reading pictures: one way to open a file, and a pass that finds the files that cannot be opened.

A header can be fine while the data behind it are cut off, so the pass decodes every file to the end. JPEG
files are decoded at an eighth of their size, which still reads the whole stream.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress

from ..errors import GraftError

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".avif",
    }
)
"""File name endings (lower case) that count as pictures; everything else in a folder is ignored."""

ProgressCallback = Callable[[int, int], None]
"""Called with the number of files done and the number of files in all."""

_CHUNK = 32


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    The orientation that a camera noted is applied, the first frame of an animation is taken, transparency
    is dropped and 16-bit grey is scaled to 8 bits.

    Raises:
        GraftError: The file is missing, no picture, or cut off.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise GraftError(f"cannot read the image {os.fspath(path)}: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as 8-bit RGB; a picture that is RGB already is returned as it is.

    Raises:
        ValueError: The picture holds floating-point values, whose range nobody knows.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # PIL would clip 16-bit values at 255, which turns most pictures white.
        return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it holds floating-point values; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def unreadable(
    paths: Sequence[Path], *, strict: bool = False, progress: ProgressCallback | None = None
) -> dict[int, str]:
    """Decode every file to its end.

    Args:
        paths: The files.
        strict: Raise at the first file that cannot be read.
        progress: Told how far the pass is; without it a bar is drawn when the error stream is a terminal.

    Returns:
        Index -> reason, for the files that cannot be read.

    Raises:
        GraftError: ``strict`` and a file cannot be read; the message names it.
    """
    chunks = [range(i, min(i + _CHUNK, len(paths))) for i in range(0, len(paths), _CHUNK)]
    found: dict[int, str] = {}
    with (
        _watched(len(paths), progress) as tick,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        # Warnings are a property of the process, so they are silenced here and not in the threads.
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        decoded = pool.map(lambda chunk: [_decode(paths[i]) for i in chunk], chunks)
        for chunk, reasons in zip(chunks, decoded, strict=True):
            for i, reason in zip(chunk, reasons, strict=True):
                if reason is None:
                    continue
                if strict:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise GraftError(
                        f"cannot read the image {paths[i]}: {reason}; repair or remove it, "
                        "or leave strict off to skip such files"
                    )
                found[i] = reason
            tick(chunk.stop)
    return found


def _decode(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (32, 32))
            image.load()
            if image.mode == "F":
                to_rgb(image)
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not a picture in a known format"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _watched(total: int, callback: ProgressCallback | None) -> Iterator[Callable[[int], None]]:
    """Yield what is told how many files are done: the caller's function, a bar, or nothing."""
    console = Console(stderr=True)
    if callback is not None:
        yield lambda done: callback(done, total)
    elif console.is_terminal and total >= 20 * _CHUNK:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("checking images", total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield lambda done: None
