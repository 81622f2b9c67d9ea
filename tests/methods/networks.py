"""Networks of the tests of the methods: timm models without data, to be counted, and tiny real ones, to be trained."""

from __future__ import annotations

import functools

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.build import build

SIDE = 32
TINY = ("test_resnet", "test_convnext", "test_efficientnet", "test_vit", "swin")
"""Backbones for tests that run: BatchNorm, LayerNorm on maps, SAME padding, tokens, windows."""


@functools.cache
def anatomy(name: str, num_classes: int = 0) -> tg.Anatomy:
    """The anatomy of a timm model without data and, unless asked for, without a classifier."""
    with torch.device("meta"):
        return tg.anatomy(timm.create_model(name, num_classes=num_classes))


def count(name: str, method: str | tg.Method, num_classes: int = 0) -> int:
    """How many values a method trains on a timm model, shared ones once, without a head of its own."""
    with torch.device("meta"):
        return _values(tg.method(method).placements(anatomy(name, num_classes)))


def count_with_head(name: str, method: str | tg.Method) -> int:
    """How many values an adapter for 100 classes trains."""
    with torch.device("meta"):
        return _values(build(anatomy(name), tg.method(method), num_classes=100, batchnorm="frozen"))


def tiny(name: str, num_classes: int = 3) -> nn.Module:
    """A small backbone with random weights whose BatchNorms and residual branches are not those of a fresh one."""
    torch.manual_seed(0)
    if name == "swin":
        model: nn.Module = SwinTransformer(
            img_size=SIDE, patch_size=4, embed_dim=8, depths=(1, 3), num_heads=(1, 2), window_size=4,
            num_classes=num_classes,
        )  # fmt: skip
    else:
        sized = {"img_size": SIDE} if "vit" in name else {}
        model = timm.create_model(name, num_classes=num_classes, **sized)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, SIDE, SIDE)}
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_mean"):
                tensor.normal_(std=0.1)
            elif key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith(("weight", "gamma")) and tensor.abs().max() < 1e-3:
                tensor.fill_(0.5)  # a fresh network's closed residual branches and layer scales
    return model.eval()


def images(count: int = 2, side: int = SIDE) -> Tensor:
    """A batch of images (N, 3, side, side), always the same."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def train_step(adapter: tg.Adapter, lr: float = 0.1, batch: Tensor | None = None) -> None:
    """One training step of everything the adapter owns, in training mode."""
    model = adapter.model.train()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=lr)
    model(images() if batch is None else batch).square().mean().backward()
    optimizer.step()
    model.eval()


def _values(placed: list) -> int:
    unique = {id(p): p.numel() for placement in placed for p in placement.parameters()}
    return sum(unique.values())
