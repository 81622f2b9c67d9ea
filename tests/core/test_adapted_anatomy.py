"""The anatomy of an adapted model is that of the plain one: addresses, blocks and sites do not move."""

import pytest
import timm
import torch
from torch import nn

import torchgraft as tg

NAMES = [
    "resnet18",
    "convnext_atto",
    "vgg11",
    "densenet121",
    "efficientnet_lite0",
    "mobilenetv3_small_050",
    "regnety_002",
]


@pytest.mark.parametrize("method", ["conv-adapter", "bitfit"])
@pytest.mark.parametrize("name", NAMES)
def test_attaching_moves_no_address(name: str, method: str) -> None:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    plain = tg.anatomy(model)
    before = {path: plain.address(path) for path in plain.modules}
    tg.attach(model, method, num_classes=5)
    adapted = tg.anatomy(model)
    assert {path: adapted.address(path) for path in adapted.modules} == before
    assert [(s.path, s.role) for s in adapted.sites] == [(s.path, s.role) for s in plain.sites]
