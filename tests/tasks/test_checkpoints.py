from __future__ import annotations

import errno
import os
import pickle

import pytest
import torch

from torchgraft.errors import GraftError
from torchgraft.tasks.checkpoints import (
    AtomicCheckpointIO,
    Patience,
    RunCheckpoints,
    read_checkpoint,
)


def test_a_full_disk_is_an_error_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"value": torch.ones(2)}, path)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GraftError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"value": torch.zeros(2)}, path)
    assert torch.equal(read_checkpoint(path)["value"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_reading_a_checkpoint_executes_nothing(tmp_path):
    path, mark = tmp_path / "last.ckpt", tmp_path / "executed"
    torch.save({"state_dict": Trap(str(mark))}, path)
    with pytest.raises(GraftError, match="damaged or not one of torchgraft's"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(Trap(str(mark)), protocol=2))
    with pytest.raises(GraftError):
        read_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_one_line_with_its_name(tmp_path, content):
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(GraftError, match=r"last\.ckpt") as error:
        read_checkpoint(tmp_path / "last.ckpt")
    assert "\n" not in str(error.value)


class FakeTrainer:
    def __init__(self):
        self.callback_metrics, self.saved, self.current_epoch, self.should_stop = {}, [], 0, False

    def save_checkpoint(self, path):
        self.saved.append(path.name)


@pytest.mark.parametrize(
    ("monitor", "values", "best_epoch"),
    [
        ("val_accuracy", [0.5, 0.75, 0.75, 0.25], 3),
        ("val_loss", [1.0, 0.5, 0.5, 2.0], 3),
        ("val_accuracy", [0.5, 0.25], 1),
    ],
)
def test_the_best_epoch_is_kept_and_a_tie_goes_to_the_later_one(tmp_path, monitor, values, best_epoch):
    checkpoints, trainer = RunCheckpoints(tmp_path, monitor), FakeTrainer()
    for epoch, value in enumerate(values):
        trainer.current_epoch, trainer.callback_metrics = epoch, {monitor: torch.tensor(value)}
        checkpoints.on_train_epoch_end(trainer, None)
    assert checkpoints.best_epoch == best_epoch
    assert trainer.saved.count("last.ckpt") == len(values)
    restored = RunCheckpoints(tmp_path, monitor)
    restored.load_state_dict(checkpoints.state_dict())
    assert (restored.best, restored.best_epoch) == (checkpoints.best, best_epoch)


def test_exhausted_patience_survives_a_restart():
    trainer, patience = FakeTrainer(), Patience("val_accuracy", 2)
    state = patience.state_dict()
    patience.load_state_dict({**state, "wait_count": 1})
    patience.on_fit_start(trainer, None)
    assert not trainer.should_stop
    patience.load_state_dict({**state, "wait_count": 2})
    patience.on_fit_start(trainer, None)
    assert trainer.should_stop
