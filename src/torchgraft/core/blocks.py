"""Finding the blocks of a backbone, their stages, and the role of every layer inside them.

Blocks are found from the outside in: the first module on the way down that stands in a list (or is one of
several numbered siblings) and whose class is called a block, bottleneck, layer, residual or unit, as they
are in timm, torchvision, transformers and most research code. Blocks that share a parent form a stage.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from torch import nn

from .graft import RESERVED
from .layers import is_conv, is_norm

_BLOCK = re.compile(
    r"Block|Bottle[Nn]eck|Layer$|Layer\d?d?$|Residual|Unit|Separable|ConvBnAct|MBConv|MbConv|Cell$|Inverted|ResBlock"
)
_STAGE = re.compile(r"Stage|Stack$|DenseBlock$|Blocks$|BasicLayer$|Encoder$|Decoder$|ConvLayer|Norm|Dropout")
_ONE_SITE = re.compile(r"^(BasicBlock|BasicBlockB|PreActBasic|ResNetBasicLayer|NormFreeBasic|SelectiveKernelBasic)$")
"""Blocks of two plain 3x3 convolutions: the first one is the site (Conv-Adapter's basic block)."""
_SHORTCUT = {"downsample", "shortcut", "se", "se_early", "se_module", "aa", "squeeze_excite", "attn_last"}
_ATTENTION = {"attn", "attention", "self_attention", "self_attn", "SelfAttention", "EncDecAttention", "cross_attn"}
_QKV = {"qkv": "attn.qkv", "in_proj": "attn.qkv", "q": "attn.q", "k": "attn.k", "v": "attn.v"}
_QKV |= {f"{letter}_proj": f"attn.{letter}" for letter in "qkv"}
_QKV |= {"query": "attn.q", "key": "attn.k", "value": "attn.v"}
_PROJ = {"proj", "o_proj", "out_proj", "o", "dense", "to_out", "out"}


@dataclasses.dataclass(frozen=True)
class Block:
    """One block: its path, its stage and its number inside the stage (both from 0), its class name."""

    path: str
    stage: int
    index: int
    name: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of blocks with one parent; ``root`` is the outermost module that holds only this stage."""

    root: str
    blocks: tuple[Block, ...]


def find_stages(model: nn.Module) -> list[Stage]:
    """All stages in the order of the model, each with its blocks."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for path, module in _outermost_blocks(model, ""):
        groups.setdefault(path.rpartition(".")[0], []).append((path, class_name(module)))
    parents = list(groups)
    stages = []
    for number, (parent, members) in enumerate(groups.items()):
        blocks = tuple(Block(p, number, i, name) for i, (p, name) in enumerate(members))
        stages.append(Stage(_stage_root(parent, parents), blocks))
    return stages


def roles_in_block(block: nn.Module, name: str) -> dict[str, str]:
    """Role of every layer inside a block, by path relative to the block.

    Roles: ``spatial_conv`` (kernel > 1, where a Conv-Adapter goes), ``conv`` (any other convolution),
    ``attn`` (the attention module), ``attn.{qkv,q,k,v,proj}``, ``mlp.fc1``, ``mlp.fc2``, ``mlp`` (the
    module that holds them), ``norm``, ``linear`` (any other).
    """
    roles: dict[str, str] = {}
    attention = _attention_paths(block)
    for path, module in inner_modules(block):
        parts = path.split(".")
        inside = next((a for a in attention if path == a or path.startswith(a + ".")), None)
        if path in attention:
            roles[path] = "attn"
        elif is_norm(module):
            roles[path] = "norm"
        elif is_conv(module) or isinstance(module, nn.Linear):
            roles[path] = _leaf_role(parts, module, inside is not None)
    spatial = [p for p, r in roles.items() if r == "spatial_conv"]
    if _ONE_SITE.match(name):
        roles |= dict.fromkeys(spatial[1:], "conv")
    for path in list(roles):
        parent = path.rpartition(".")[0]
        if roles[path] == "mlp.fc1" and parent and parent not in roles:
            roles[parent] = "mlp"
    return roles


def inner_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` without the module itself and without what adapters added."""
    for path, inner in module.named_modules():
        if path and RESERVED not in path.split("."):
            yield path, inner


def class_name(module: nn.Module) -> str:
    """The name of the module's own class, adapted or not."""
    from ..swap import original_class

    return original_class(module).__name__


def _outermost_blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    listed = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    for name, child in module.named_children():
        if name == RESERVED:
            continue
        path = f"{prefix}.{name}" if prefix else name
        if (listed or name[-1].isdigit()) and _is_block(child):
            yield path, child
        else:
            yield from _outermost_blocks(child, path)


def _is_block(module: nn.Module) -> bool:
    name = class_name(module)
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and not name.endswith(("Block", "Layer")):
        return False
    if not _BLOCK.search(name) or _STAGE.search(name) or is_norm(module):
        return False
    return any(is_conv(m) or isinstance(m, nn.Linear) for _, m in inner_modules(module))


def _stage_root(parent: str, parents: list[str]) -> str:
    """The outermost ancestor of ``parent`` that holds no other stage; ``parent`` itself in flat models."""
    root = parent
    while root and len(parents) > 1:
        above = root.rpartition(".")[0]
        if not above or any(p != parent and (p == above or p.startswith(above + ".")) for p in parents):
            break
        root = above
    return root


def _attention_paths(block: nn.Module) -> list[str]:
    """The outermost attention modules of a block."""
    found: list[str] = []
    for path, module in inner_modules(block):
        last = path.rpartition(".")[2]
        named = last in _ATTENTION or class_name(module).endswith("Attention")
        layered = any(is_conv(m) or isinstance(m, nn.Linear) for _, m in inner_modules(module))
        if named and layered and not any(path.startswith(f + ".") for f in found):
            found.append(path)
    return found


def _leaf_role(parts: list[str], module: nn.Module, in_attention: bool) -> str:
    last = parts[-1]
    if in_attention:
        if last in _QKV:
            return _QKV[last]
        if last in _PROJ:
            return "attn.proj"
    if is_conv(module):
        kernel = module.kernel_size
        shortcut = any(p in _SHORTCUT for p in parts)
        if any(k > 1 for k in kernel) and not shortcut and not in_attention:  # type: ignore[union-attr]
            return "spatial_conv"
        if not (any(p.startswith("mlp") for p in parts[:-1]) and last in ("fc1", "fc2")):
            return "conv"
    if in_attention:
        return "linear"
    if last in ("fc1", "fc2"):
        return f"mlp.{last}"
    if isinstance(module, nn.Linear) and module.out_features != module.in_features:
        return "mlp.fc1" if module.out_features > module.in_features else "mlp.fc2"
    return "linear"
