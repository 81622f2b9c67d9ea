"""Builder of the system ``denseclip``: modules, the segmentor, the detector's pyramid and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from timm.models import byobnet
from torch import Tensor, nn

from torchgraft.errors import GraftError
from torchgraft.tasks.dense.box_loss import box_targets
from torchgraft.tasks.denseclip import (
    ClipTokenizer,
    ClipViT,
    ContextDecoder,
    DenseAttentionPool,
    DenseClipDetectorBackbone,
    DenseClipSegmentor,
    LanguageGuided,
    PooledTrunk,
    TextEncoder,
    create_trunk,
    denseclip_name,
    find_vocabulary,
)
from torchgraft.tasks.denseclip.attention_pool import PositionMode
from torchgraft.tasks.heads import SemanticFPN

from ..backbone_case import BackboneCase
from ..case import Config, GoldenCase, StateError, Tensors
from ..files import CaseError


def attention_pool(config: Config, mode: str) -> GoldenCase:
    """One pool in both position modes."""
    _known(config, "form", "spatial_size", "embed_dim", "num_heads", "output_dim")
    pool = _built(
        lambda: DenseAttentionPool(
            config["spatial_size"], config["embed_dim"], config["num_heads"], config["output_dim"]
        )
    )
    return PoolCase(pool, _same)


def context_decoder(config: Config, mode: str) -> GoldenCase:
    """The decoder alone."""
    options = {key: value for key, value in config.items() if key != "form"}
    return DecoderCase(_decoder(options), _same)


def text_encoder(config: Config, mode: str) -> GoldenCase:
    """The text encoder alone, with contexts as an input."""
    _known(config, "form", *_TEXT, "sot_id", "eot_id")
    if (config["sot_id"], config["eot_id"]) != (config["vocab_size"] - 2, config["vocab_size"] - 1):
        raise CaseError("denseclip: the last two ids of the vocabulary must be start and end of text")
    return TextCase(_text(config, config["embed_dim"]), config["n_ctx"] * config["width"])


def segmentor(config: Config, mode: str) -> GoldenCase:
    """Image and labels in; logits and both losses out."""
    _known(config, *_NETWORK, "head_channels", "identity_loss_weight", "ignore_index", "ce_denominator")
    model = _built(
        lambda: DenseClipSegmentor(
            *_sides(config),
            decoder=_decoder_options(config),
            concat_scaled=config["concat_scaled"],
            tau=config["tau"],
            make_head=partial(SemanticFPN, fpn_width=config["fpn_channels"], width=config["head_channels"]),
            score_loss_weight=config["identity_loss_weight"],
            ignore_index=config["ignore_index"],
            denominator=config["ce_denominator"],
        )
    )
    _check_sizes(config, model)
    return SegmentorCase(model, lambda key: denseclip_name(key, model))


def detector(config: Config, mode: str) -> GoldenCase:
    """Image and boxes in; pyramid levels, targets and the auxiliary loss out."""
    _known(config, *_NETWORK, "fpn_start_level", "fpn_num_outs", "fpn_extra_convs")
    if config["fpn_extra_convs"] != "on_input":
        raise CaseError(f"denseclip: fpn_extra_convs={config['fpn_extra_convs']!r}, we have 'on_input'")
    start = config["fpn_start_level"]
    model = _built(
        lambda: DenseClipDetectorBackbone(
            *_sides(config),
            decoder=_decoder_options(config),
            concat_scaled=config["concat_scaled"],
            tau=config["tau"],
            fpn_channels=config["fpn_channels"],
            start_level=start,
            extra_levels=config["fpn_num_outs"] - (4 - start),
        )
    )
    _check_sizes(config, model)
    return DetectorCase(model, lambda key: denseclip_name(key, model))


def tokenizer(config: Config, mode: str) -> GoldenCase:
    """Names in, ids out; the vocabulary is one that this machine has."""
    _known(config, "form", "names16", "names5", "sot_id", "eot_id", "vocab_size")
    ours = _built(lambda: ClipTokenizer.from_file(find_vocabulary()))
    if (ours.sot_id, ours.eot_id, ours.eot_id + 1) != (config["sot_id"], config["eot_id"], config["vocab_size"]):
        raise CaseError(f"denseclip: our vocabulary ends with {ours.sot_id}, {ours.eot_id}, the case's differs")
    return TokenizerCase(ours, config["names16"], config["names5"])


T = TypeVar("T")

FORMS = {
    "attention_pool": attention_pool,
    "context_decoder": context_decoder,
    "text_encoder": text_encoder,
    "segmentor": segmentor,
    "detector": detector,
    "tokenizer": tokenizer,
}

_TEXT = ("context_length", "class_tokens", "n_ctx", "vocab_size", "width", "heads", "layers", "embed_dim")
_NETWORK = (
    "form",
    "backbone",
    "pos_mode",
    "num_classes",
    "embed_dim",
    "text",
    "context_decoder",
    "fpn_channels",
    "score_concat_index",
    "concat_scaled",
    "tau",
)


class PoolCase(BackboneCase):
    """The same weights in both modes; the loss is that of the resized positions."""

    model: DenseAttentionPool

    def forward(self, inputs: Tensors) -> Tensors:
        outputs = {}
        modes: tuple[tuple[PositionMode, str, str], ...] = (("resize", "x", ""), ("crop", "x_det", "det_"))
        for self.model.pos_mode, name, prefix in modes:
            outputs[f"{prefix}global"], outputs[f"{prefix}dense"] = self.model(inputs[name])
        return outputs

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["dense"].square().mean()


class DecoderCase(BackboneCase):
    def forward(self, inputs: Tensors) -> Tensors:
        return {"out": self.model(inputs["text"], inputs["visual"])}

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["out"].square().mean()


class TextCase(BackboneCase):
    """Only the contexts, an input, train in use; gradients of the encoder are stored all the same.

    Args:
        encoder: The encoder.
        trained: Elements of the contexts.
    """

    def __init__(self, encoder: TextEncoder, trained: int) -> None:
        super().__init__(encoder, _same)
        self._trained = trained

    def forward(self, inputs: Tensors) -> Tensors:
        return {"out": self.model(inputs["text"], inputs["context"])}

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["out"].square().mean()

    def counts(self) -> dict[str, int]:
        return super().counts() | {"trainable_count": self._trained}


class NetworkCase(BackboneCase):
    """A segmentor or detector; its text encoder is frozen."""

    model: LanguageGuided

    def frozen(self) -> Tensors:
        return self.model.text_encoder.state_dict()

    def forward(self, inputs: Tensors) -> Tensors:
        self.model.class_tokens = inputs["texts"]
        return self.network(inputs)

    def network(self, inputs: Tensors) -> Tensors:
        raise NotImplementedError


class SegmentorCase(NetworkCase):
    model: DenseClipSegmentor

    def network(self, inputs: Tensors) -> Tensors:
        logits, guided = self.model.segment(inputs["image"])
        losses = self.model.losses(logits, guided.scores, inputs["gt"][:, 0])
        return {
            "backbone_last": guided.visual.maps[self.model.backbone.dense_index],
            "logits": F.interpolate(logits, inputs["image"].shape[-2:], mode="bilinear", align_corners=False),
            "loss_decode": losses["loss_segmentation"],
            "loss_identity": losses["loss_score"],
            "score_map": guided.scores,
            "text_embeddings": guided.text,
        }

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["loss_decode"] + outputs["loss_identity"]


class DetectorCase(NetworkCase):
    model: DenseClipDetectorBackbone

    def network(self, inputs: Tensors) -> Tensors:
        levels, scores = self.model.detect(inputs["image"])
        count = sum(name.startswith("boxes") for name in inputs)
        boxes = [inputs[f"boxes{i}"] for i in range(count)]
        labels = [inputs[f"labels{i}"] for i in range(count)]
        targets = box_targets(boxes, labels, self.model.num_classes, (scores.shape[2], scores.shape[3]))
        return {
            **{f"fpn{i}": level for i, level in enumerate(levels.values())},
            "loss_seg": self.model.score_loss(scores, boxes, labels),
            "score_stride4": scores,
            "seg_target": targets.target,
            "seg_mask": targets.inside,
        }

    def loss(self, outputs: Tensors) -> Tensor:
        return outputs["loss_seg"]


class TokenizerCase(GoldenCase):
    """No state and no parameters."""

    def __init__(self, tokenizer: ClipTokenizer, names16: list[str], names5: list[str]) -> None:
        self._tokenizer, self._names16, self._names5 = tokenizer, names16, names5

    def name_of(self, key: str) -> str | None:
        raise StateError(f"official key {key!r}: a tokenizer has no tensors")

    def state(self) -> Tensors:
        return {}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def adapter_parameters(self) -> set[str]:
        return set()

    def frozen(self) -> Tensors:
        return {}

    def train(self, mode: bool) -> None:
        """A tokenizer has no modes."""

    def run(self, inputs: Tensors) -> Tensors:
        return {"ids16": self._tokenizer(self._names16)[:, :16], "ids5": self._tokenizer(self._names5, 5)}

    def loss(self, outputs: Tensors) -> Tensor:
        raise StateError("a tokenizer has no loss")


def _sides(config: Config) -> tuple[nn.Module, TextEncoder, Tensor]:
    """Backbone, text encoder and class tokens; the tokens of the case are an input and come later."""
    text = config["text"]
    _known(text, *_TEXT[:-1])
    if text["context_length"] != text["class_tokens"] + text["n_ctx"]:
        raise CaseError("denseclip: context_length must be class_tokens + n_ctx")
    tokens = torch.zeros(config["num_classes"], text["class_tokens"], dtype=torch.int64)
    return _backbone(config), _text(text, config["embed_dim"]), tokens


def _text(config: Config, embed_dim: int) -> TextEncoder:
    names = ("context_length", "vocab_size", "width", "heads", "layers")
    return TextEncoder(**{name: config[name] for name in names}, embed_dim=embed_dim)


def _backbone(config: Config) -> nn.Module:
    body = config["backbone"]
    if body["type"] == "clip_vit":
        if config["pos_mode"] != "resize":
            raise CaseError(f"denseclip: pos_mode={config['pos_mode']!r}; positions of a ViT are resized")
        options = {key: value for key, value in body.items() if key != "type"}
        _known(
            options,
            "patch_size",
            "width",
            "layers",
            "heads",
            "input_resolution",
            "output_dim",
            "out_indices",
            "double_cls",
        )
        return ClipViT(**options)
    if body["type"] != "clip_resnet":
        raise CaseError(f"denseclip: backbone type {body['type']!r}; we have 'clip_resnet' and 'clip_vit'")
    _known(body, "type", "layers", "width", "input_resolution", "output_dim", "attnpool_heads")
    return _clip_resnet(config, body)


def _clip_resnet(config: Config, body: Config) -> PooledTrunk:
    width = body["width"]
    blocks = tuple(
        byobnet.ByoBlockCfg(type="bottle", d=depth, c=4 * width * 2**i, s=2 if i else 1, br=0.25)
        for i, depth in enumerate(body["layers"])
    )
    # timm rounds widths to multiples of 8, which changes the small ones of a case only.
    with mock.patch.object(byobnet, "make_divisible", int):
        return create_trunk(
            "resnet50_clip",
            body["output_dim"],
            input_size=body["input_resolution"],
            pos_mode=config["pos_mode"],
            heads=body["attnpool_heads"],
            pretrained=False,
            blocks=blocks,
            stem_chs=(width // 2, width // 2, width),
        )


def _decoder_options(config: Config) -> dict[str, int | float]:
    options = dict(config["context_decoder"])
    if options.pop("visual_dim", None) != config["embed_dim"]:
        raise CaseError("denseclip: the context decoder's visual_dim must be embed_dim")
    return options


def _decoder(options: Config) -> ContextDecoder:
    _known(options, "width", "heads", "layers", "visual_dim", "dropout")
    return _built(lambda: ContextDecoder(**options))


def _check_sizes(config: Config, model: LanguageGuided) -> None:
    if config["score_concat_index"] != model.backbone.dense_index:
        raise CaseError(f"denseclip: our scores join map {model.backbone.dense_index}, not score_concat_index")


def _known(config: Config, *keys: str) -> None:
    if unknown := sorted(set(config) - set(keys)):
        raise CaseError(f"denseclip: the config holds {', '.join(unknown)}, which means nothing to us")


def _built(build: Callable[[], T]) -> T:
    try:
        return build()
    except GraftError as error:
        raise CaseError(str(error)) from error


def _same(key: str) -> str:
    return key
