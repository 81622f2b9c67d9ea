"""What becomes of an exception: one line on standard error that says what to do, and an exit code.

Exit codes: 0 done, 1 a mistake of torchgraft, 2 a mistake in the input or of the machine (missing file, full
disk, no such name), 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
import traceback


class Interrupted(KeyboardInterrupt):
    """The user stopped a verb that can say how to go on."""


_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder with --out",
    errno.EDQUOT: "the quota is used up; free some space or choose another folder with --out",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder with --out",
    errno.ENOENT: "check the path",
}


def report_failure(error: BaseException, *, debug: bool) -> int | None:
    """Print what went wrong.

    Args:
        error: What a verb raised.
        debug: Show the whole trace before the line.

    Returns:
        The exit code, or None when the exception is typer's own and must travel on.
    """
    if type(error).__module__.startswith("typer") or isinstance(error, BrokenPipeError):
        return None
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        advice = str(error) if isinstance(error, Interrupted) else "type the command again to start over"
        print(f"interrupted; {advice}", file=sys.stderr)
        return 130
    line, code = _describe(error)
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code


def _describe(error: BaseException) -> tuple[str, int]:
    from ..errors import GraftError

    kind = type(error).__name__
    if isinstance(error, GraftError):
        return str(error), 2
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        advice = _ADVICE.get(error.errno or 0)
        return f"{error.strerror or error}{place}" + (f"; {advice}" if advice else ""), 2
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return "out of memory; use a smaller --batch-size or --image-size", 2
    if isinstance(error, ImportError):
        return f"{error}; `torchgraft doctor` says what is missing", 2
    return f"this is a mistake in torchgraft ({kind}: {error}); `torchgraft --debug ...` shows where", 1
