"""The backbones that we register in timm: their names, and small ones of every architecture."""

from __future__ import annotations

import importlib

import timm

import torchgraft.backbones.timm_api as timm_api

NAMES = sorted(name for module in timm_api.ARCHITECTURES for name in timm.list_models(module=module))
SMALL = [name for name in NAMES if name.startswith("test_")]
"""One or more per architecture, made for tests."""


def module_of(name: str):
    """The Python module that defines a backbone."""
    return importlib.import_module(timm.model_entrypoint(name).__module__)


def make(name: str, **options):
    """A backbone of ours with random weights under which every branch shows."""
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.device.type != "meta" and parameter.abs().max() < 1e-3:
                parameter.normal_(0.3 if "gamma" in key else 0.0, 0.1)
    return model.eval()
