"""A run that is really killed and resumed must end with the bits of a run that was not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from torchgraft.core import read_tensors
from torchgraft.tasks import train
from torchgraft.tasks.checkpoints import read_checkpoint

SCRIPT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from torchgraft.tasks import read_config, train
from torchgraft.tasks.classification import ClassificationTask

# Slow enough for the test to hit the run between two steps.
step = ClassificationTask.training_step
def slow(self, batch, batch_idx):
    time.sleep(0.05)
    return step(self, batch, batch_idx)
ClassificationTask.training_step = slow
config = read_config(Path(sys.argv[1]))
train(config, progress=False)
"""


def kill_when(process, reached, *, limit=180.0):
    """Kill ``process`` the hard way as soon as ``reached()`` holds."""
    end = time.monotonic() + limit
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the run never got there"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def position(checkpoint):
    try:
        saved = read_checkpoint(checkpoint)["Batches"]
    except ValueError:
        return (-1, 0)
    return (saved["epoch"], saved["batch"])


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({"workers": 0}, lambda where: where >= (2, 0)),
        (
            {"checkpoint_every": 1, "workers": 2, "augment": "standard", "min_epoch_steps": 9},
            lambda where: where >= (1, 7) and where[1],
        ),
    ],
    ids=["after an epoch", "inside an epoch, with loader processes"],
)
def test_a_killed_run_resumes_to_the_very_same_bits(tiny, tmp_path, changes, reached):
    settings = {"epochs": 4, "batch_size": 8, "early_stopping": 30, **changes}
    whole = train(tiny(out=tmp_path / "whole", **settings), progress=False)

    killed = tiny(out=tmp_path / "killed", **settings)
    (tmp_path / "config.yaml").write_text(killed.to_yaml())
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "config.yaml")])
    last = killed.out / "checkpoints" / "last.ckpt"
    kill_when(process, lambda: reached(position(last)))
    assert not (killed.out / "summary.json").exists()
    assert position(last)[0] < 4

    resumed = train(killed, resume=True, progress=False)
    expected, found = read_tensors(whole.out / "adapter"), read_tensors(resumed.out / "adapter")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    ends = [read_checkpoint(run.out / "checkpoints" / "last.ckpt") for run in (whole, resumed)]
    assert all(torch.equal(a, ends[1]["state_dict"][key]) for key, a in ends[0]["state_dict"].items())
    for mine, theirs in zip(*(end["optimizer_states"][0]["state"].values() for end in ends), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert resumed.steps == whole.steps
    assert [row["val_loss"] for row in resumed.history] == [row["val_loss"] for row in whole.history]
    assert [row["lr"] for row in resumed.history] == [row["lr"] for row in whole.history]
    assert resumed.worst == whole.worst


def test_a_damaged_checkpoint_stops_resuming_with_its_name(tiny, tmp_path):
    config = tiny(out=tmp_path / "run", epochs=2)
    train(config, progress=False)
    (config.out / "summary.json").unlink()
    (config.out / "checkpoints" / "last.ckpt").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        train(config, resume=True, progress=False)


def test_other_images_than_at_the_start_stop_resuming(pictures, tiny, tmp_path):
    shutil.copytree(pictures, tmp_path / "pictures")
    config = tiny(out=tmp_path / "run", data=str(tmp_path / "pictures"), epochs=1)
    train(config, progress=False)
    (config.out / "summary.json").unlink()
    (tmp_path / "pictures" / "train" / "red" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"the train images are not those .* \(47 images now\)"):
        train(config, resume=True, progress=False)


def test_a_run_that_finished_training_but_was_killed_while_scoring_is_scored(tiny, tmp_path):
    config = tiny(out=tmp_path / "run", epochs=2)
    result = train(config, progress=False)
    (config.out / "summary.json").unlink()
    again = train(config, resume=True, progress=False)
    assert (again.accuracy, again.steps, again.worst) == (result.accuracy, result.steps, result.worst)
    assert again.history == result.history


def test_a_run_that_stopped_early_is_not_trained_further(tiny, tmp_path):
    config = tiny(out=tmp_path / "run", epochs=30, early_stopping=1, lr=1e-9)
    result = train(config, progress=False)
    assert result.stopped_early
    (config.out / "summary.json").unlink()
    again = train(config, resume=True, progress=False)
    assert again.stopped_early
    assert again.epochs == result.epochs
