"""Training an adapter on every architecture of ours, from a weights file to a finished run."""

from __future__ import annotations

import pytest
import torch

from torchgraft.tasks import TrainConfig, train

from .architectures import SMALL, make


@pytest.mark.parametrize("name", SMALL)
def test_conv_adapter_lowers_the_loss_on_a_folder_of_pictures(name, pictures, tmp_path):
    torch.save({"model": make(name).state_dict()}, tmp_path / "weights.pth")
    result = train(
        TrainConfig(
            data=str(pictures),
            backbone=name,
            weights=str(tmp_path / "weights.pth"),
            method="conv-adapter[reduction=4]",
            image_size=64,
            epochs=3,
            batch_size=16,
            lr=3e-3,
            head_lr=3e-2,
            device="cpu",
            out=tmp_path / "run",
        ),
        progress=False,
    )
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.9 * losses[0]
    assert 0 < result.adapter_params < result.backbone_params
