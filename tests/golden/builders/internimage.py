"""Builders of the system ``internimage``: the operator, its module, the pooling of the large head, the network."""

from __future__ import annotations

import re

from torch import Tensor, nn

from torchgraft.backbones.internimage import InternImage, official_name
from torchgraft.backbones.internimage_block import DCNv3
from torchgraft.backbones.internimage_head import AttentionPool

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase, Tensors
from ._dcnv3 import op


def dcnv3_module(config: Config, mode: str) -> GoldenCase:
    model = DCNv3(
        config["channels"],
        groups=config["group"],
        kernel_size=config["kernel_size"],
        dw_kernel_size=_kernel(config["dw_kernel_size"]),
        stride=config["stride"],
        padding=config["pad"],
        dilation=config["dilation"],
        offset_scale=config["offset_scale"],
        center_feature_scale=config["center_feature_scale"],
        remove_center=config["remove_center"],
    )
    return PartCase(model, "levels.0.blocks.0.dcn.", "stages.0.blocks.0.dcn.")


def attention_pool(config: Config, mode: str) -> GoldenCase:
    model = AttentionPool(config["dim"], config["num_heads"], config["out_dim"], qkv_bias=config["qkv_bias"])
    return PoolCase(model, "clip_projector.", "head.global_pool.")


def classifier(config: Config, mode: str) -> GoldenCase:
    after = config["level2_post_norm_block_ids"] if config["level2_post_norm"] else None
    model = InternImage(
        num_classes=config["num_classes"],
        global_pool="attn" if config["use_clip_projector"] else "avg",
        channels=config["channels"],
        depths=tuple(config["depths"]),
        groups=tuple(config["groups"]),
        mlp_ratio=config["mlp_ratio"],
        layer_scale=config["layer_scale"],
        post_norm=config["post_norm"],
        res_post_norm=config["res_post_norm"],
        offset_scale=config["offset_scale"],
        dw_kernel_size=_kernel(config["dw_kernel_size"]),
        level2_post_norm_block_ids=tuple(after or ()),
        center_feature_scale=config["center_feature_scale"],
        remove_center=config["remove_center"],
        cls_scale=config["cls_scale"],
        use_clip_projector=config["use_clip_projector"],
    )
    # The published code makes these norms wherever they are asked for, and uses them in one of its schemes.
    unused = config["res_post_norm"] and (config["post_norm"] or config["layer_scale"] is not None)
    maps = {f"feat{i}": f"stages.{i}" for i in range(len(config["depths"]))}
    return BackboneCase(
        model, official_name, maps, dead=lambda key: bool(unused and re.search(r"\.res_post_norm\d\.", key))
    )


FORMS = {"op": op, "dcnv3_module": dcnv3_module, "attention_pool": attention_pool, "classifier": classifier}


class PartCase(BackboneCase):
    """A module of the network by itself: ``x`` in, ``y`` out, the loss is the mean square of ``y``.

    Args:
        model: The module.
        official: Where the published network has it.
        ours: Where ours has it.
    """

    def __init__(self, model: nn.Module, official: str, ours: str) -> None:
        def inside(key: str) -> str:
            return (official_name(official + key) or "").removeprefix(ours)

        super().__init__(model, inside)

    def forward(self, inputs: Tensors) -> Tensors:
        return {"y": self.model(inputs["x"])}

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["y"].square().mean()


class PoolCase(PartCase):
    """Tokens (B, L, dim) in, of which ours makes a map of one column."""

    def forward(self, inputs: Tensors) -> Tensors:
        return {"y": self.model(inputs["x"].transpose(1, 2).unsqueeze(3))}


def _kernel(size: int | None) -> int:
    """The published code's default is 3."""
    return 3 if size is None else size
