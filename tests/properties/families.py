"""Small networks of many families, with random weights under which every layer counts.

One family is one kind of backbone: a library, a kind of block, a layout of tensors. The variants are timm's own
test models where there are some, else custom sizes of the real classes, so that a cell takes a fraction of a second.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import timm
import timm.models as tm
import torch
import torchvision.models as tv
import transformers as hf
from timm.layers import GroupNormAct
from timm.models import convnext, densenet, mlp_mixer, resnetv2, swin_transformer, vgg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES = 5
"""Outputs of every backbone's own classifier, so that rows of the plain backbone stack with adapted ones."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How to build one network and what to feed it.

    Attributes:
        build: A network with fresh weights.
        side: Side of its images in pixels; 0: it reads token ids.
        classifier: Whether it has a classifier that an adapter's own head can replace.
        decodes: Whether it needs ids for a decoder too.
    """

    build: Callable[[], nn.Module]
    side: int = 32
    classifier: bool = True
    decodes: bool = False

    def batch(self, rows: int = 3, seed: int = 1) -> dict[str, Any]:
        """Keyword-free arguments as ``{"args": ..., "kwargs": ...}`` for a batch of ``rows``."""
        generator = torch.Generator().manual_seed(seed)
        if self.side:
            return {"args": (torch.randn(rows, 3, self.side, self.side, generator=generator),), "kwargs": {}}
        ids = torch.randint(1, 30, (rows, 8), generator=generator)
        more = {"decoder_input_ids": ids.flip(1)} if self.decodes else {}
        return {"args": (), "kwargs": {"input_ids": ids, **more}}


def _timm(name: str, side: int = 32, **options: Any) -> Callable[[], nn.Module]:
    """A timm model whose own configuration names the size of the images of these tests."""
    overlay = {"input_size": (3, side, side)}
    return lambda: timm.create_model(name, num_classes=CLASSES, pretrained_cfg_overlay=overlay, **options)


def _vit(**options: Any) -> Callable[[], nn.Module]:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": CLASSES}
    return lambda: tm.VisionTransformer(**{**small, **options})


def _swin_v1() -> nn.Module:
    return swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=CLASSES
    )


def _torchvision_vit() -> nn.Module:
    return tv.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )


def _torchvision_swin() -> nn.Module:
    return tv.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=[4, 4], num_classes=CLASSES
    )


_SMALL_ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": CLASSES,
}
_IMAGES: dict[str, Any] = {"image_size": 32, "patch_size": 8}


FAMILIES: dict[str, Family] = {
    # timm, convolutions
    "resnet10t": Family(_timm("resnet10t", channels=(16, 24, 32, 40))),
    "test_resnet": Family(_timm("test_resnet")),
    "resnext": Family(
        lambda: tm.ResNet(tm.resnet.Bottleneck, (1, 1, 1, 1), num_classes=CLASSES, cardinality=4, base_width=4),
        side=64,
    ),
    "resnetv2": Family(
        lambda: resnetv2.ResNetV2(
            layers=[1, 1, 2],
            channels=(32, 64, 128),
            num_classes=CLASSES,
            stem_chs=32,
            stem_type="fixed",
            norm_layer=functools.partial(GroupNormAct, num_groups=4),
        ),
        side=64,
    ),
    "nfnet": Family(_timm("test_nfnet")),
    "regnety_002": Family(_timm("regnety_002")),
    "byobnet": Family(_timm("test_byobnet")),
    "vgg": Family(
        lambda: vgg.VGG([16, "M", 24, "M", 32, "M"], num_classes=CLASSES, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d),
        side=64,
    ),
    "densenet": Family(lambda: densenet.DenseNet(growth_rate=8, block_config=(2, 2, 2), num_classes=CLASSES), side=64),
    "convnext": Family(_timm("test_convnext")),
    "convnextv2": Family(
        lambda: convnext.ConvNeXt(
            depths=(1, 1, 2, 1), dims=(16, 24, 32, 40), use_grn=True, ls_init_value=None, num_classes=CLASSES
        ),
        side=64,
    ),
    "efficientnet_lite0": Family(_timm("efficientnet_lite0")),
    "tf_efficientnetv2": Family(_timm("test_efficientnet")),
    "mobilenetv3": Family(_timm("mobilenetv3_small_050")),
    "ghostnet": Family(_timm("ghostnet_050")),
    "ghost_regnet": Family(_timm("test_ghost_regnet", 64), side=64),
    "mambaout": Family(_timm("test_mambaout")),
    "hornet": Family(_timm("test_hornet")),
    "hornet_gf": Family(_timm("test_hornet_gf", 64), side=64),
    "internimage": Family(_timm("test_internimage")),
    "internimage_clip": Family(_timm("test_internimage_clip")),
    # timm, attention and mixing
    "vit": Family(_vit()),
    "deit_distilled": Family(
        lambda: tm.deit.VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES
        )
    ),
    "vit_registers": Family(_vit(reg_tokens=4, init_values=1e-5, no_embed_class=True)),
    "swin": Family(_swin_v1),
    "maxvit": Family(_timm("test_maxvit", 64, img_size=64), side=64),
    "coatnet": Family(_timm("test_coatnet", 64, img_size=64), side=64),
    "hatnet": Family(_timm("test_hatnet", 64), side=64),
    "revcol": Family(_timm("test_revcol", 64), side=64),
    "beit": Family(
        lambda: tm.Beit(
            img_size=32,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=CLASSES,
            init_values=0.1,
            use_abs_pos_emb=False,
            use_rel_pos_bias=True,
        )
    ),
    "eva02": Family(
        lambda: tm.Eva(
            img_size=32,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=CLASSES,
            qkv_fused=False,
            mlp_ratio=2,
            swiglu_mlp=True,
            scale_mlp=True,
            use_rot_pos_emb=True,
        )
    ),
    "mixer": Family(
        lambda: mlp_mixer.MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=16, num_classes=CLASSES)
    ),
    # torchvision
    "torchvision_resnet": Family(lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), side=64),
    "torchvision_mobilenet_v3": Family(lambda: tv.mobilenet_v3_small(num_classes=CLASSES), side=64),
    "torchvision_vit": Family(_torchvision_vit),
    "torchvision_swin": Family(_torchvision_swin, side=64),
    # transformers
    "hf_vit": Family(lambda: hf.ViTForImageClassification(hf.ViTConfig(**_SMALL_ENCODER, **_IMAGES))),
    "hf_dinov2": Family(
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_SMALL_ENCODER, **_IMAGES, mlp_ratio=2))
    ),
    "hf_convnext": Family(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=32, num_labels=CLASSES)
        )
    ),
    "hf_resnet": Family(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 48], depths=[1, 1, 1], num_labels=CLASSES)
        ),
        side=224,
    ),
    "hf_swin": Family(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=32,
                patch_size=2,
                embed_dim=8,
                depths=[2, 2],
                num_heads=[1, 2],
                window_size=4,
                num_labels=CLASSES,
            )
        )
    ),
    "hf_bert": Family(lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SMALL_ENCODER, vocab_size=30)), side=0),
    "hf_t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=30)
        ),
        side=0,
        classifier=False,
        decodes=True,
    ),
}


def network(family: str) -> nn.Module:
    """A fresh copy of the family's network, in eval mode; every copy has the same weights."""
    return copy.deepcopy(_original(family))


def run(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The logits that the model returns for the batch, without gradients (with them kernels may round otherwise)."""
    with torch.no_grad():
        return logits(model, batch)


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The tensor that the model returns for the batch."""
    out = model(*batch["args"], **batch["kwargs"])
    while not isinstance(out, Tensor):
        out = out["logits"] if isinstance(out, dict) else out[0]
    return out


def rows(batch: dict[str, Any], *chosen: int) -> dict[str, Any]:
    """Some rows of a batch."""
    index = torch.tensor(chosen)
    return {"args": tuple(a[index] for a in batch["args"]), "kwargs": {k: v[index] for k, v in batch["kwargs"].items()}}


@functools.cache
def _original(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family].build()
    _spread(model)
    _calibrate(model, FAMILIES[family].batch(rows=8, seed=2))
    return model.eval()


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Weights under which every branch shows: kernels of unit gain, no closed gamma, no zero bias."""
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if parameter.dim() >= 2 and last != "gain":
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif parameter.abs().max() < 1e-3 and ("bias" in last or "token" in last):
            parameter.normal_(std=0.1)
        elif parameter.abs().max() < 1e-3:
            parameter.uniform_(0.2, 0.6)
        else:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))


@torch.no_grad()
def _calibrate(model: nn.Module, batch: dict[str, Any]) -> None:
    """BatchNorm statistics near those of random images, so that no signal dies on the way through the network."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    rates = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    run(model.train(), batch)
    for norm, rate in zip(norms, rates, strict=True):
        norm.momentum = rate
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.3)).clamp_(min=0.05)
