"""DenseCLIP: dense prediction guided by CLIP's text encoder."""

from __future__ import annotations

from .attention_pool import ConvProjector, DenseAttentionPool, resize_positions
from .checkpoint import denseclip_name, load_clip_text, load_clip_visual, trunk_name
from .context_decoder import ContextDecoder
from .detector import DenseClipDetectorBackbone
from .prompting import Guided, LanguageGuided, score_map
from .segmentor import DenseClipSegmentor
from .text import TextEncoder
from .tokenizer import ClipTokenizer, find_vocabulary
from .visual import ClipViT, PooledTrunk, VisualFeatures, create_trunk

__all__ = [
    "ClipTokenizer",
    "ClipViT",
    "ContextDecoder",
    "ConvProjector",
    "DenseAttentionPool",
    "DenseClipDetectorBackbone",
    "DenseClipSegmentor",
    "Guided",
    "LanguageGuided",
    "PooledTrunk",
    "TextEncoder",
    "VisualFeatures",
    "create_trunk",
    "denseclip_name",
    "find_vocabulary",
    "load_clip_text",
    "load_clip_visual",
    "resize_positions",
    "score_map",
    "trunk_name",
]
