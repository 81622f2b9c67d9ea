"""Files that are either the old ones or the new ones, never half of each.

A file is written beside its target under a temporary name, flushed to the disk and renamed over it. When
anything fails on the way (disk full, killed process) the old file is still there and the temporary one is
removed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .errors import GraftError


@contextlib.contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``target``; on success it takes the target's place.

    Args:
        target: The file to write or replace. Its folder is created.

    Raises:
        GraftError: The operating system refused (no space, no permission); the old file is untouched.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise GraftError(f"cannot write {target}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise GraftError(
            f"cannot write {target}: {error.strerror or error}; whatever was there before is unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Replace ``target`` by ``text`` (UTF-8) in one step."""
    with replacing(target) as path:
        path.write_text(text, encoding="utf-8")


def write_files(folder: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write several files of one folder; none is replaced before all have been written.

    Args:
        folder: Where the files go; created when missing.
        writers: File name -> function that writes the file at the path it is given.
    """
    with contextlib.ExitStack() as stack:
        for name, write in writers.items():
            write(stack.enter_context(replacing(Path(folder) / name)))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
