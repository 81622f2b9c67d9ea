import socket
import urllib.error

import huggingface_hub.constants
import pytest

from torchgraft.backbones import network
from torchgraft.backbones.network import failure_reason, hub_or_cache, network_patience


def test_the_reason_is_the_lowest_cause_in_one_line():
    try:
        try:
            raise OSError(-2, "Name or service not known")
        except OSError as low:
            raise RuntimeError("could not\nload") from low
    except RuntimeError as error:
        assert failure_reason(error) == "Name or service not known"
    assert failure_reason(urllib.error.URLError(OSError(110, "timed out"))) == "timed out"
    assert failure_reason(RuntimeError("two\nlines")) == "two lines"
    assert failure_reason(RuntimeError("[Errno -3] Try again")) == "Try again"
    assert failure_reason(KeyError()) == "KeyError"


def test_patience_ends_with_the_block_even_after_an_error():
    before = socket.getdefaulttimeout()
    with pytest.raises(KeyError), network_patience(3.0):
        assert socket.getdefaulttimeout() == 3.0
        raise KeyError
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("answers", [True, False])
def test_the_hub_is_used_only_when_it_answers(monkeypatch, answers):
    class Session:
        def head(self, url, timeout):
            if not answers:
                raise TimeoutError("timed out")

    monkeypatch.setattr(network, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub_or_cache() as reason:
        assert reason == (None if answers else "timed out")
        assert huggingface_hub.constants.is_offline_mode() != answers
    assert not huggingface_hub.constants.is_offline_mode()


def test_offline_mode_asks_nothing(monkeypatch):
    monkeypatch.setattr(network, "get_session", lambda: pytest.fail("asked the network"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with hub_or_cache() as reason:
        assert reason == "HF_HUB_OFFLINE is set"
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True
