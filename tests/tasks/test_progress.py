from __future__ import annotations

import io

import pytest
from rich.console import Console

from torchgraft.tasks import train
from torchgraft.tasks.progress import ProgressDisplay, _clock


class OneEpoch:
    def __init__(self):
        self.images_per_second = 100.0
        self.rows = [
            {"epoch": 2, "train_loss": 0.51, "val_loss": 0.62, "val_accuracy": 0.875, "images_per_second": 100.0}
        ]


class Trainer:
    is_global_zero, global_step, max_epochs, current_epoch = True, 4, 5, 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_a_bar_and_a_file_gets_plain_lines(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160)
    display = ProgressDisplay(OneEpoch(), 10, console)
    display.on_train_start(Trainer(), None)
    display.on_train_batch_end(Trainer(), None, None, None, 0)
    display.on_train_epoch_end(Trainer(), None)
    display.on_train_batch_end(Trainer(), None, None, None, 1)
    display.on_train_end(Trainer(), None)
    text = out.getvalue()
    assert ("\x1b[" in text) == terminal
    assert "epoch 2/5" in text
    assert "val accuracy 87.5 %" in text
    assert "100 img/s" in text
    assert "left" in text
    assert "GB" in text
    if not terminal:
        assert text.count("\n") == 1


def test_a_long_epoch_is_not_silent_where_there_is_no_terminal():
    out = io.StringIO()
    display = ProgressDisplay(OneEpoch(), 10, Console(file=out, width=160))
    display.on_train_start(Trainer(), None)
    display.on_train_batch_end(Trainer(), None, None, None, 0)
    assert out.getvalue() == ""
    display.quiet_seconds = 0.0
    display.on_train_batch_end(Trainer(), None, None, None, 1)
    assert out.getvalue().startswith("epoch 2/5  step 4/10  100 img/s")


def test_progress_goes_to_standard_error_only(tiny, tmp_path, capfd):
    train(tiny(out=tmp_path / "run", epochs=2))
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_durations_are_written_like_a_clock(seconds, text):
    assert _clock(seconds) == text
