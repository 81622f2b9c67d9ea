"""The role of every layer inside a block: what a method means by "the spatial convolution" or "fc1"."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .blocks import class_name, inner_modules
from .layers import in_channels, is_conv, is_norm, out_channels

_ONE_SITE = re.compile(r"^BasicBlock|^(SelectiveKernel|PreAct|ResNet|Dla)Basic(Layer)?$|^SEResNetBlock$")
"""Blocks of two plain 3x3 convolutions: the first one is the site (Conv-Adapter's basic block)."""
_SHORTCUT = {"downsample", "shortcut", "se", "se_early", "se_module", "aa", "squeeze_excite", "attn_last"}
_GATE = re.compile(
    r"^SE(Block)?$|(^|[a-z])SE(Module|Layer)$|^SpatialAttention$|^SpatialTransformerBlock$|Squeeze|^C?[Ee]ca|^EffectiveSE|Cbam|^(Light)?(Channel|Spatial)Attn|GlobalContext$|GatherExcite"
    r"|CoordAttn|SimAm"
)
"""Classes that rescale channels or positions and are called attention by some."""
_ATTENTION = re.compile(r"Att(entio)?n|SH[MS]A|MHSA|MLA")
_SPLIT = re.compile(r"^SplitAttn|^SelectiveKernel(Attn|Conv)?$")
"""Convolutions with several paths that are weighted against each other."""
_CONV_MLP = re.compile(r"^DepthwiseMlp$")
"""MLPs of 1x1 convolutions that no name of an attribute tells."""

_NAMES = {
    "attn.qkv": "qkv qkvs pwise in_proj to_qkv c_attn query_key_value Wqkv qkv_proj",
    "attn.q": "q to_q q_proj query query_proj to_query q_lin wq",
    "attn.k": "k to_k k_proj key key_proj to_key k_lin wk",
    "attn.v": "v to_v v_proj value value_proj to_value v_lin wv",
    "attn.kv": "kv to_kv kv_proj",
    "attn.qk": "qk to_qk qk_proj",
    "attn.proj": "proj o_proj out_proj o dense to_out out output projection out_lin c_proj proj_out wo merge project",
    "mlp.fc1": "fc1 fc1_g fc1_x wi wi_0 wi_1 up_proj gate_proj lin1 linear1 c_fc intermediate",
    "mlp.fc2": "fc2 wo down_proj lin2 linear2",
}
"""What the layers are called in timm, torchvision, transformers and elsewhere."""
_IN_ATTENTION = {name: role for role, names in _NAMES.items() if role.startswith("attn") for name in names.split()}
_QKV = {name for name, role in _IN_ATTENTION.items() if role != "attn.proj"}
_IN_MLP = {name: role for role, names in _NAMES.items() if role.startswith("mlp") for name in names.split()}
_TOKENS = re.compile(r"tokens?$|spatial|sgu|gate$")
"""Names of modules whose linear layers mix positions, not features."""


def roles_in_block(block: nn.Module, name: str) -> dict[str, str]:
    """Role of every layer inside a block, by path relative to the block.

    Roles: ``spatial_conv`` (kernel > 1, where a Conv-Adapter goes), ``conv`` (any other convolution),
    ``attn`` (the attention module), ``attn.{qkv,q,k,v,kv,qk,proj}`` (``kv`` and ``qk`` are fused in this
    order), ``mlp.fc1`` (both halves of a gated MLP have it), ``mlp.fc2``, ``mlp`` (the module that holds
    them), ``norm``, ``linear`` (any other).

    Args:
        block: The block.
        name: Its class name.
    """
    inner = dict(inner_modules(block))
    attention = _attention_paths(inner)
    roles: dict[str, str] = {}
    rest: dict[str, nn.Module] = {}
    for path, module in inner.items():
        holder = next((a for a in attention if path.startswith(a + ".")), None)
        if path in attention:
            roles[path] = "attn"
        elif is_norm(module):
            roles[path] = "norm"
        elif not is_conv(module) and not isinstance(module, nn.Linear):
            continue
        elif holder is not None:
            roles[path] = _in_attention(path[len(holder) + 1 :].split("."), module)
        else:
            roles[path] = "linear" if isinstance(module, nn.Linear) else "conv"
            rest[path] = module
    roles |= _mlp_roles(rest, inner)
    rest = {p: m for p, m in rest.items() if not _inside(p, inner, _GATE)}
    _mark_spatial(roles, rest, transformer="attn" in roles.values())
    spatial = [p for p, r in roles.items() if r == "spatial_conv"]
    if _ONE_SITE.search(name):
        roles |= {p: "conv" for p in spatial if p.partition(".paths.")[0] != spatial[0].partition(".paths.")[0]}
    return roles


def _attention_paths(inner: dict[str, nn.Module]) -> list[str]:
    """The outermost attention modules: those that compute queries, keys and values."""
    found: list[str] = []
    for path, module in inner.items():
        if any(path.startswith(f + ".") for f in found) or not _called_attention(path, module):
            continue
        names = {part for p, _ in inner_modules(module) for part in p.split(".")}
        holds_mlp = any(n in module._modules for n in ("mlp", "ffn"))
        computes = isinstance(module, nn.MultiheadAttention) or (bool(names & _QKV) and not holds_mlp)
        if computes and not _wraps_attention(path, module):
            found.append(path)
    return found


def _wraps_attention(path: str, module: nn.Module) -> bool:
    """Whether the module only puts a norm or a shortcut around an attention module inside it."""
    inner = dict(inner_modules(module))
    layers = [p for p, m in inner.items() if is_conv(m) or isinstance(m, nn.Linear)]
    nested = [p for p, m in inner.items() if m._modules and _called_attention(f"{path}.{p}", m)]
    return any(all(layer.startswith(p + ".") for layer in layers) for p in nested)


def _called_attention(path: str, module: nn.Module) -> bool:
    last, name = path.rpartition(".")[2].lower(), class_name(module)
    if _GATE.search(name) or _SPLIT.search(name):
        return False
    return "attention" in last or "attn" in last or bool(_ATTENTION.search(name))


def _in_attention(parts: list[str], module: nn.Module) -> str:
    kind = "conv" if is_conv(module) else "linear"
    if is_conv(module) and max(module.kernel_size) > 1:  # type: ignore[arg-type]
        return kind
    for part in parts:
        if part in _IN_ATTENTION:
            return _IN_ATTENTION[part]
    return kind


def _mlp_roles(layers: dict[str, nn.Module], inner: dict[str, nn.Module]) -> dict[str, str]:
    """``mlp.fc1`` and ``mlp.fc2`` by name, else as a pair of layers that widens and narrows again."""
    roles: dict[str, str] = {}
    plain: list[tuple[str, int, int]] = []
    for path, module in layers.items():
        parts = path.split(".")
        if any(_TOKENS.search(p) for p in parts) or _inside(path, inner, _GATE, _SPLIT):
            continue
        names = parts[-2:] if parts[-1] in ("linear", "conv", "dense", "c", "l") else parts[-1:]
        within = _inside(path, inner, _CONV_MLP)
        called = within or any("mlp" in p or "ffn" in p for p in parts[:-1])
        if is_conv(module) and (max(module.kernel_size) > 1 or not called):  # type: ignore[arg-type]
            continue
        named = next((_IN_MLP[n] for n in names if n in _IN_MLP), None)
        if named or parts[-2:] == ["output", "dense"]:
            roles[path] = named or "mlp.fc2"
        elif isinstance(module, nn.Linear) or within:
            plain.append((path, in_channels(module) or 0, out_channels(module) or 0))
    for i, (path, cin, wide) in enumerate(plain):
        back = next((p for p, a, b in plain[i + 1 :] if b == cin and a in (wide, wide // 2)), None)
        if wide > cin and back is not None:
            roles |= {path: "mlp.fc1", back: "mlp.fc2"}
    return roles | dict.fromkeys(_holders(roles), "mlp")


def _holders(roles: dict[str, str]) -> Iterator[str]:
    """Modules that hold both an fc1 and an fc2; a block that holds them itself is none."""
    for path in [p for p, r in roles.items() if r == "mlp.fc2"]:
        above = path.rpartition(".")[0]
        while above and not any(r == "mlp.fc1" and p.startswith(above + ".") for p, r in roles.items()):
            above = above.rpartition(".")[0]
        if above:
            yield above


def _mark_spatial(roles: dict[str, str], layers: dict[str, nn.Module], *, transformer: bool) -> None:
    """Convolutions with a kernel become ``spatial_conv``, but for shortcuts and a transformer's MLP."""
    for path, module in layers.items():
        parts = path.split(".")
        if not is_conv(module) or max(module.kernel_size) == 1 or any(p in _SHORTCUT for p in parts):  # type: ignore[arg-type]
            continue
        if not (transformer and any("mlp" in p or "ffn" in p for p in parts[:-1])):
            roles[path] = "spatial_conv"


def _inside(path: str, inner: dict[str, nn.Module], *classes: re.Pattern[str]) -> bool:
    """Whether a module above ``path`` in the block is of one of these classes."""
    parts = path.split(".")
    names = [class_name(inner[a]) for a in (".".join(parts[:i]) for i in range(1, len(parts))) if a in inner]
    return any(c.search(n) for c in classes for n in names)
