"""What holds around a run: event files, determinism, and Lightning's habits that a user should not meet."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from ..errors import GraftError


class EventFiles(TensorBoardLogger):
    """TensorBoard's event files in the run folder itself, without Lightning's second copy of the settings.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(save_dir=folder, name="", version="")

    def save(self) -> None:
        """Flush the events."""
        self.experiment.flush()


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms while training, and whatever was set before afterwards.

    Filling fresh memory, which PyTorch adds to find reads of it, stays off: it costs a tenth of the time.
    """
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    benchmark, fill = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = fill


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's advice on settings that are chosen here on purpose; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def orderly_errors() -> Iterator[None]:
    """A keyboard interrupt stays one (Lightning makes it an exit), and too little memory says what to do."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        reason = f"cannot write {error.filename or 'the run folder'}: {error.strerror}"
        raise GraftError(f"{reason}; the last checkpoint is unharmed, resume when there is room") from error
    except torch.OutOfMemoryError as error:
        raise GraftError("out of memory: lower batch_size (and raise accumulate) or image_size") from error
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)
