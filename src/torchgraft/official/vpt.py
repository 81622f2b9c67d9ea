"""VPT's official code (KMnP/vpt, commit 4410440): ``prompt_embeddings`` in a ViT, MAE, Swin, ResNet or ConvNeXt.

Its ViT has the names of the JAX checkpoints (``enc.transformer.encoder.layer.0.attn.query``), its MAE and Swin timm's,
its ConvNets those of torchvision and of the published ConvNeXt, split into ``prompt_layers`` and ``frozen_layers``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.method import Method
from ..errors import GraftError
from ..methods.vpt import VPTDeep, VPTShallow
from ..methods.vpt_add import VPTAdd
from ..methods.vpt_image import VPTBelow, VPTPad
from .base import Place, System, UnknownKeyError, register_system

_LAYER = re.compile(r"^enc\.transformer\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$")
_IN_LAYER = {
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
    "attn.out": "attn.proj",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
}
_QKV = ("attn.query", "attn.key", "attn.value")
_ELSEWHERE = {
    "enc.transformer.embeddings.cls_token": "cls_token",
    "enc.transformer.embeddings.position_embeddings": "pos_embed",
    "enc.transformer.embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "enc.transformer.embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "enc.transformer.encoder.encoder_norm.weight": "norm.weight",
    "enc.transformer.encoder.encoder_norm.bias": "norm.bias",
}
_PROMPT = re.compile(r"^(?:enc\.)?(?:transformer\.)?(deep_)?prompt_(embeddings|proj)(?:[_.](\w+))?$")
_CONVNEXT = re.compile(r"^frozen_layers\.(downsample_layer|stage)(\d)\.(\d+)\.(.+)$")
_PIXELS = ("pixel", "pixel-gaussian", "pixel-imagenet")


@register_system("vpt")
class VPTCode(System):
    """The official VPT.

    What shapes do not tell are options of our methods (``reverse``, ``shared``, ``noexpand``, ``pool``, ``dropout``,
    ``start``), and ``location`` where a prompt per position (``"add"``) or for all (``"add-1"``) looks like tokens.
    """

    def __init__(self, model: nn.Module, *, location: str | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.location = location

    def method(self, state: Mapping[str, Tensor]) -> Method:
        """The method that the prompts' shapes tell."""
        found = {k.rpartition(".")[2] if "proj" not in k else k: t for k, t in state.items() if _PROMPT.match(k)}
        first = found.get("prompt_embeddings")
        deep = [t for k, t in found.items() if k.startswith("deep_prompt_embeddings")]
        if first is None and not deep and "prompt_embeddings_tb" not in found:
            raise GraftError("vpt: the state holds no 'prompt_embeddings'; expected a network with prompts")
        self.location = self.location or self._location(state, first)
        if self.location == "pad":
            rows = found["prompt_embeddings_lr"]
            return VPTPad(**{"prompt_size": rows.shape[3] // 2, "image_size": rows.shape[2], **self.options})
        if self.location == "below":
            assert first is not None
            return VPTBelow(**{"num_channels": first.shape[1], "image_size": first.shape[2], **self.options})
        if self.location == "pixel":
            assert first is not None
            return VPTShallow(**{"start": "pixel", "num_tokens": first.shape[3] // first.shape[2], **self.options})
        projection = next((t for k, t in found.items() if k.endswith("prompt_proj.weight")), None)
        read: dict[str, Any] = {} if projection is None else {"project": projection.shape[1]}
        if len(deep) == 1 and not len(deep[0]):
            self.options.setdefault("num_layers", 1)
        layers = deep[0].shape[0] + (first is not None) if len(deep) == 1 else None
        if layers not in (None, len(getattr(self.model, "blocks", ()))):
            read["num_layers"] = layers
        if self.location in ("add", "add-1"):
            return VPTAdd(**{"location": self.location, "deep": bool(deep), **read, **self.options})
        read["num_tokens"] = (deep[0] if first is None else first).shape[1]
        return (VPTDeep if deep else VPTShallow)(**{**read, **self.options})

    def is_dead(self, key: str) -> bool:
        """Deep prompts that the official code owns and never uses: where all are shared, and tensors without a row."""
        if "deep_prompt_embeddings" not in key:
            return False
        options, stages = self.options, getattr(self.model, "layers", None)
        if stages is not None:
            return key.endswith("_0") and len(stages[0].blocks) == 1
        return bool(options.get("shared")) or (options.get("num_layers") == 1 and not options.get("reverse"))

    def place(self, key: str) -> Place | None:
        """A prompt, the head, or a tensor of the backbone under timm's name."""
        if key.startswith("head.last_layer."):
            return Place("head", "", key.removeprefix("head.last_layer."))
        if found := _PROMPT.match(key):
            return Place("adapter", "", self._prompt(found))
        if found := _LAYER.match(key):
            index, inner, leaf = found.groups()
            if inner in _QKV:
                return Place("backbone", f"blocks.{index}.attn.qkv", leaf, part=(_QKV.index(inner), 3))
            if inner in _IN_LAYER:
                return Place("backbone", f"blocks.{index}.{_IN_LAYER[inner]}", leaf)
            raise UnknownKeyError(key)
        path, _, leaf = self._timm(key).rpartition(".")
        return Place("backbone", path, leaf)

    def _timm(self, key: str) -> str:
        """The key of a backbone's tensor under timm's names."""
        if key in _ELSEWHERE:
            return _ELSEWHERE[key]
        if found := _CONVNEXT.match(key):
            kind, number, index, rest = found.groups()
            stage = int(number) - 1
            if kind == "downsample_layer":
                return f"{f'stages.{stage}.downsample' if stage else 'stem'}.{index}.{rest}"
            rest = re.sub(r"^pwconv(\d)", r"mlp.fc\1", rest.replace("dwconv.", "conv_dw."))
            return f"stages.{stage}.blocks.{index}.{rest}"
        if re.match(r"enc\.layers\.\d+\.downsample", key):
            # timm keeps a patch merging in the stage behind it.
            return re.sub(r"^enc\.layers\.(\d+)", lambda m: f"layers.{int(m[1]) + 1}", key)
        for prefix in ("frozen_layers.", "prompt_layers.", "enc."):
            if key.startswith(prefix):
                return key.removeprefix(prefix)
        if key.startswith("norm."):  # ConvNeXt's, behind the pooling
            return f"head.{key}"
        raise UnknownKeyError(key)

    def _prompt(self, found: re.Match[str]) -> str:
        """Our name for a tensor that the official code calls a prompt."""
        deep, kind, rest = found.groups()
        if kind == "proj":
            return f"prompts.project.{rest}"
        if rest in ("tb", "lr"):
            return {"tb": "top_bottom", "lr": "left_right"}[rest]
        if deep:
            return f"prompts.deep.{rest or 0}"
        return {"below": "prompt", "pixel": "pixels"}.get(self.location or "", "prompts.first")

    def _location(self, state: Mapping[str, Tensor], first: Tensor | None) -> str:
        if first is None:
            return "pad" if any("prompt_embeddings_tb" in k for k in state) else "prepend"
        if first.dim() == 4:
            embedding = state.get("enc.transformer.embeddings.patch_embeddings.weight")
            wider = embedding is not None and embedding.shape[1] > first.shape[1] == embedding.shape[1] - 3
            return "below" if wider or "prompt_layers.conv1.weight" in state else "pixel"
        positions = getattr(self.model, "pos_embed", None)
        return "add" if positions is not None and positions.shape[1] == first.shape[1] else "prepend"
