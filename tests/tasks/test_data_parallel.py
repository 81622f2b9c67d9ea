"""Two processes on the processor stand for two devices."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from torchgraft.core import read_tensors
from torchgraft.tasks import evaluate, read_result, train

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from torchgraft.tasks import read_config, train

if __name__ == "__main__":
    train(read_config(Path(sys.argv[1])), progress=False)
"""


@pytest.mark.slow
def test_two_devices_train_one_adapter_and_write_one_run(tiny, tmp_path):
    config = tiny(out=tmp_path / "two", devices=2, batch_size=8, strategy="ddp", augment="none")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "run.py").write_text(SCRIPT)
    subprocess.run([sys.executable, str(tmp_path / "run.py"), str(tmp_path / "config.yaml")], check=True, timeout=300)
    two = read_result(config.out / "summary.json")
    assert evaluate(two.out, device="cpu").confusion == two.confusion
    assert json.loads((config.out / "environment.json").read_text())["data"]["train"]["images"] == 48

    # The same batches on one device: equal up to the order in which gradients are summed.
    one = train(tiny(out=tmp_path / "one", batch_size=16, augment="none"), progress=False)
    assert two.steps == one.steps
    assert [row["val_loss"] for row in two.history] == pytest.approx([row["val_loss"] for row in one.history], rel=1e-3)
    assert [row["train_loss"] for row in two.history] == pytest.approx(
        [row["train_loss"] for row in one.history], rel=1e-3
    )
    single, double = read_tensors(one.out / "adapter"), read_tensors(two.out / "adapter")
    assert single.keys() == double.keys()
