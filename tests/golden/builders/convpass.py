"""Builders of the system ``convpass``: our method on a small ViT and on two Swin blocks."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from torchgraft.errors import GraftError
from torchgraft.methods.convpass import Convpass
from torchgraft.official.convpass import ConvpassCode

from .. import hosts
from ..adapted import AdaptedNetwork
from ..case import Config, GoldenCase, Tensors
from ..files import CaseError


def vit(config: Config, mode: str) -> GoldenCase:
    host = hosts.vit(config["vit"])
    blocks = {f"block{i}": f"blocks.{i}" for i in range(config["vit"]["depth"])}
    return VitCase(
        host,
        ConvpassCode(host),
        num_classes=config["vit"]["num_classes"],
        mode=mode,
        method=_method(config),
        blocks=blocks,
    )


def swin_blocks(config: Config, mode: str) -> GoldenCase:
    host = SwinBlocks(config["swin"])
    blocks = {f"block{i}": f"blocks.{i}" for i in range(len(host.blocks))}
    return SwinCase(host, ConvpassCode(host), num_classes=None, mode=mode, method=_method(config), blocks=blocks)


FORMS = {"vit": vit, "swin_blocks": swin_blocks}


class VitCase(AdaptedNetwork):
    """``logits`` and the output of every block."""

    def run(self, inputs: Tensors) -> Tensors:
        return {name: tensor for name, tensor in super().run(inputs).items() if name != "features"}


class SwinBlocks(nn.Module):
    """Consecutive Swin blocks of one stage; a map (B, C, H, W) in, for the dry run too."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.in_chans, self.image_size = config["dim"], tuple(config["input_resolution"])
        self.blocks = nn.Sequential(
            *[
                SwinTransformerBlock(
                    dim=config["dim"],
                    input_resolution=self.image_size,
                    num_heads=config["num_heads"],
                    window_size=config["window_size"],
                    shift_size=shift,
                    mlp_ratio=config["mlp_ratio"],
                )
                for shift in config["shift_sizes"]
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.permute(0, 2, 3, 1))


class SwinCase(AdaptedNetwork):
    """Tokens (B, H W, C) in and out, as in timm 0.4.12; the loss is the mean square of the last block's."""

    def run(self, inputs: Tensors) -> Tensors:
        outputs = super().run(inputs)
        return {name: tensor.flatten(1, 2) for name, tensor in outputs.items() if name != "logits"}

    def loss(self, outputs: Tensors) -> Tensor:
        last = max(outputs)
        return outputs[last].square().mean()

    def _forward(self, inputs: Tensors) -> Tensor:
        host: SwinBlocks = self._model  # type: ignore[assignment]
        return self._model(inputs["tokens"].transpose(1, 2).unflatten(-1, host.image_size))


def _method(config: Config) -> Convpass:
    try:
        return Convpass(
            width=config["hidden"],
            scale=config["scale"],
            sites=tuple(config["sites"]),
            kernel=config["kernel"],
            act=config["act"],
            dropout=config["dropout"],
        )
    except GraftError as error:
        raise CaseError(str(error)) from error
