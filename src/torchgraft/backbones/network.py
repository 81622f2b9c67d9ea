"""Downloads that fail within seconds.

By default the Hugging Face client asks a dead network six times per file, which takes three quarters of a
minute before the first error, and ``urllib`` waits for ever. Here one request decides whether the hub can be
reached; if it cannot, only its local cache is used.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

import huggingface_hub.constants
from huggingface_hub.utils import get_session

_SECONDS = 8.0


@contextlib.contextmanager
def network_patience(seconds: float = _SECONDS) -> Iterator[None]:
    """Let every socket that is opened meanwhile give up after ``seconds`` without an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def hub_or_cache(seconds: float = _SECONDS) -> Iterator[str | None]:
    """Use the hub if it answers one request, and only the local cache of its files if not.

    Yields:
        None when the hub answers, otherwise why it does not.
    """
    reason = _hub_failure(seconds)
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = before or reason is not None
    try:
        with network_patience(seconds):
            yield reason
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def failure_reason(error: BaseException) -> str:
    """One line about what lies at the bottom of ``error``."""
    while True:
        cause = error.__cause__ or getattr(error, "reason", None)
        if not isinstance(cause, BaseException):
            break
        error = cause
    text = getattr(error, "strerror", None) or str(error)
    text = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(str(text).split()))
    return text or type(error).__name__


def _hub_failure(seconds: float) -> str | None:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        # The client's own session knows the proxy, the certificates and HF_ENDPOINT. Any answer will do.
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=seconds)
    except Exception as error:
        return failure_reason(error)
    return None
