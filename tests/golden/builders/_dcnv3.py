"""The form ``op`` of the system ``internimage``: DCNv3 alone, by every backend that runs on this machine."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from torchgraft.ops import backend_in_use, dcnv3
from torchgraft.ops.dcnv3.backends import FORMS

from ..case import Config, GoldenCase, StateError, Tensors
from ..compare import difference
from ..files import CaseError

_KEYS = {"group", "group_channels", "kernel", "stride", "pad", "dilation", "offset_scale", "remove_center"}
_INPUTS = ("x", "offset", "mask")

AGREE = 5e-6
"""How far backends may be apart, of the largest number: a quarter of what the narrowest case allows."""


def backends() -> list[str]:
    """The default of the CPU first."""
    names = [backend_in_use("cpu"), "torch", *FORMS]
    if os.environ.get("TRITON_INTERPRET"):
        names.append("triton")
    return list(dict.fromkeys(names))


def op(config: Config, mode: str) -> GoldenCase:
    """Independent calls of the operator, each with inputs of its own."""
    for name, options in config["ops"].items():
        if unknown := options.keys() - _KEYS:
            raise CaseError(f"op: {name} has unknown values {sorted(unknown)}")
    return OpCase(config["ops"])


class OpCase(GoldenCase):
    """No state. The outputs are the first backend's; the others' and their gradients are compared with them."""

    def __init__(self, ops: Config) -> None:
        self._ops = ops

    def name_of(self, key: str) -> str | None:
        raise StateError(f"official key {key!r} has no place: the operator has no state")

    def state(self) -> Tensors:
        return {}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def adapter_parameters(self) -> set[str]:
        return set()

    def frozen(self) -> Tensors:
        return {}

    def train(self, mode: bool) -> None:
        pass

    def run(self, inputs: Tensors) -> Tensors:
        first, *others = backends()
        expected = self._with_gradients(inputs, first)
        for backend in others:
            found = self._with_gradients(inputs, backend)
            lines = [difference(f"{backend}: {k}", found[k], expected[k], absolute=0.0, relative=AGREE) for k in found]
            assert not any(lines), "\n".join(line for line in lines if line)
        return self._outputs(inputs, first)

    def loss(self, outputs: Tensors) -> Tensor:
        return torch.stack([y.square().mean() for y in outputs.values()]).sum()

    def _outputs(self, inputs: Tensors, backend: str) -> Tensors:
        return {f"{name}/y": self._call(name, inputs, backend) for name in self._ops}

    def _call(self, name: str, inputs: Tensors, backend: str) -> Tensor:
        config, tensors = self._ops[name], [inputs[f"{name}/{key}"] for key in _INPUTS]
        if tensors[0].shape[-1] != config["group"] * config["group_channels"]:
            channels = f"group {config['group']} of group_channels {config['group_channels']}"
            raise CaseError(f"op: {name}/x has {tensors[0].shape[-1]} channels, {channels} are expected")
        return dcnv3(
            *tensors,
            kernel_size=config["kernel"],
            stride=config["stride"],
            padding=config["pad"],
            dilation=config["dilation"],
            groups=config["group"],
            offset_scale=config["offset_scale"],
            remove_center=config["remove_center"],
            backend=backend,
        )

    @torch.enable_grad()
    def _with_gradients(self, inputs: Tensors, backend: str) -> Tensors:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        outputs = self._outputs(leaves, backend)
        self.loss(outputs).backward()
        return {n: y.detach() for n, y in outputs.items()} | {
            f"grad/{n}": t.grad for n, t in leaves.items() if t.grad is not None
        }
