"""From published tensors to ours: CLIP's weights (OpenAI or Hugging Face names) and DenseCLIP checkpoints.

A converter renames, transposes, concatenates or resizes position tables; nothing else.

    ours                                         DenseCLIP, CLIP ResNet
    backbone.provider.backbone.model.stem.convN  backbone.convN, backbone.bnN
    backbone.provider.backbone.model.stages.I.J  backbone.layer{I+1}.J
    backbone.pool                                backbone.attnpool
    decode_head.neck, decode_head.head           neck, decode_head                             of a segmentor
    neck.inner_blocks.I.0, neck.layer_blocks.I.0 neck.lateral_convs.I.conv, neck.fpn_convs.I.conv   of a detector
    neck.extra_blocks.convs.I                    neck.fpn_convs.{levels + I}.conv

All other names are the same. CLIP's image tower has the names of the second column under ``visual.``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import GraftError
from .attention_pool import resize_positions
from .detector import DenseClipDetectorBackbone
from .prompting import LanguageGuided
from .segmentor import DenseClipSegmentor
from .text import TextEncoder
from .visual import ClipViT, PooledTrunk

_TRUNK = "provider.backbone.model."
_RESNET = (
    (re.compile(r"^conv(\d)\.weight$"), rf"{_TRUNK}stem.conv\1.conv.weight"),
    (re.compile(r"^bn(\d)\."), rf"{_TRUNK}stem.conv\1.bn."),
    (re.compile(r"^layer(\d)\.(\d+)\.downsample\.0\."), rf"{_TRUNK}stages.@\1.\2.shortcut.conv.conv."),
    (re.compile(r"^layer(\d)\.(\d+)\.downsample\.1\."), rf"{_TRUNK}stages.@\1.\2.shortcut.conv.bn."),
    (re.compile(r"^layer(\d)\.(\d+)\.(conv|bn)2\."), rf"{_TRUNK}stages.@\1.\2.conv2_kxk.\3."),
    (re.compile(r"^layer(\d)\.(\d+)\.(conv|bn)([13])\."), rf"{_TRUNK}stages.@\1.\2.conv\4_1x1.\3."),
    (re.compile(r"^attnpool\."), "pool."),
)
_STAGE = re.compile(r"@(\d)")
_NECK = re.compile(r"^neck\.(lateral_convs|fpn_convs)\.(\d+)\.conv\.")
_HF_TEXT = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_HF_QKV = re.compile(r"^(.*\.attn\.|.*\.self_attn\.)([qkv])_proj\.(weight|bias)$")


def trunk_name(key: str, trunk: PooledTrunk | ClipViT) -> str:
    """Our name, inside a trunk, of a tensor of CLIP's image tower (``visual.`` removed).

    Args:
        key: ``layer1.0.conv1.weight`` and the like; names of the vision transformer stay.
        trunk: The trunk that it goes into.
    """
    if isinstance(trunk, ClipViT):
        return key
    for pattern, ours in _RESNET:
        if pattern.match(key):
            return _STAGE.sub(lambda found: str(int(found[1]) - 1), pattern.sub(ours, key))
    return key


def denseclip_name(key: str, model: LanguageGuided) -> str:
    """Our name of a tensor of a DenseCLIP checkpoint.

    Args:
        key: The official name.
        model: The segmentor, with a Semantic FPN, or the detector's backbone that it goes into.
    """
    if key.startswith("backbone."):
        return f"backbone.{trunk_name(key.removeprefix('backbone.'), model.backbone)}"
    if isinstance(model, DenseClipSegmentor):
        return re.sub(r"^(neck|decode_head)\.", _segmentor_part, key)
    if isinstance(model, DenseClipDetectorBackbone) and (found := _NECK.match(key)):
        level, rest = int(found[2]), key[found.end() :]
        levels = len(model.neck.inner_blocks)
        if found[1] == "lateral_convs":
            return f"neck.inner_blocks.{level}.0.{rest}"
        if level < levels:
            return f"neck.layer_blocks.{level}.0.{rest}"
        return f"neck.extra_blocks.convs.{level - levels}.{rest}"
    return key


def _segmentor_part(found: re.Match[str]) -> str:
    return "decode_head.neck." if found[1] == "neck" else "decode_head.head."


def load_clip_text(encoder: TextEncoder, state: Mapping[str, Tensor]) -> None:
    """Load CLIP's text side; its position table is cut to the encoder's length.

    Args:
        encoder: What is loaded into.
        state: Tensors of a CLIP under OpenAI's names, or of ``CLIPTextModelWithProjection`` (or ``CLIPModel``) under
            those of transformers. Tensors of the image tower are passed over.

    Raises:
        GraftError: A tensor is missing, unknown or of another shape.
    """
    source = _from_hf(state) if any(key.startswith("text_model.") for key in state) else dict(state)
    ours = encoder.state_dict()
    source = {key: value for key, value in source.items() if key in ours or key.startswith("transformer.")}
    if (table := source.get("positional_embedding")) is not None:
        source["positional_embedding"] = table[: encoder.context_length]
    _load(encoder, source, "CLIP's text encoder")


def load_clip_visual(trunk: PooledTrunk | ClipViT, state: Mapping[str, Tensor]) -> None:
    """Load CLIP's image tower; its position table is resized bilinearly to the trunk's grid.

    Args:
        trunk: What is loaded into: a ResNet with attention pool, or a vision transformer.
        state: Tensors of a CLIP under OpenAI's names; the image tower's begin with ``visual.``.

    Raises:
        GraftError: A tensor is missing, unknown or of another shape.
    """
    prefix = "visual."
    source = {
        trunk_name(key.removeprefix(prefix), trunk): value for key, value in state.items() if key.startswith(prefix)
    }
    ours = trunk.state_dict()
    for name in ("positional_embedding", "pool.positional_embedding"):
        if name in source and name in ours:
            side = round((ours[name].shape[0] - 1) ** 0.5)
            source[name] = resize_positions(source[name].float(), (side, side))
    # The blocks that rescale a vision transformer's maps are new.
    rescaling = {key: value for key, value in ours.items() if re.match(r"fpn\d\.", key)}
    _load(trunk, rescaling | source, "CLIP's image tower")


def _load(module: torch.nn.Module, source: Mapping[str, Tensor], what: str) -> None:
    ours = module.state_dict()
    missing, unknown = sorted(ours.keys() - source.keys()), sorted(source.keys() - ours.keys())
    shaped = [key for key in sorted(ours.keys() & source.keys()) if ours[key].shape != source[key].shape]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    for problem, keys in (("lacks", missing), ("holds the unknown", unknown), ("has another shape of", shaped)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise GraftError(f"the file {problem} {', '.join(keys[:3])}{more}; expected the weights of {what}")
    module.load_state_dict(source, strict=False)


def _from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if not key.startswith("text_"):
            continue
        if key == "text_projection.weight":
            renamed["text_projection"] = value.T
            continue
        for theirs, ours in _HF_TEXT:
            key = key.replace(theirs, ours)
        if found := _HF_QKV.match(key):
            block = found[1].replace(".self_attn.", ".attn.")
            parts.setdefault(f"{block}in_proj_{found[3]}", {})[found[2]] = value
        elif key.startswith(("token_", "positional_", "ln_final.", "transformer.")):
            renamed[key] = value
    for key, found_parts in parts.items():
        if found_parts.keys() == set("qkv"):
            renamed[key] = torch.cat([found_parts[part] for part in "qkv"])
    return renamed
