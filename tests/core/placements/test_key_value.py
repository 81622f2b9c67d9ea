"""KeyValue: extra keys and values inside attention, against an explicit softmax."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.placements import KeyValue

from ..attaching import Remembered, assert_close, assert_every_tensor_learns, attach, run

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Prefix(nn.Module):
    def __init__(self, count: int, width: int = 8) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(count, width)), nn.Parameter(torch.randn(count, width))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class SeparateAttention(nn.Module):
    """Attention with layers of its own for queries, keys and values, as in transformers."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads = heads

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _fused(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(tl.Attention(8, num_heads=2, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _explicit(module: nn.Module, form: Prefix, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q [P_k; K]^T / sqrt(d)) [P_v; V], head by head."""
    d = 8 // module.num_heads
    q, k, v = module.qkv(x).chunk(3, -1)
    k = torch.cat([form.keys.expand(len(x), -1, -1), k], 1)
    v = torch.cat([form.values.expand(len(x), -1, -1), v], 1)
    heads = []
    for h in range(module.num_heads):
        own = slice(h * d, (h + 1) * d)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / d**0.5
        if mask is not None:
            scores = scores + torch.cat([torch.zeros(len(mask), len(form.keys)), mask], 1)
        heads.append(scores.softmax(-1) @ v[..., own])
    return module.proj(torch.cat(heads, -1))


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "with bias": {"qkv_bias": True},
    "with normed queries and keys": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "with a norm before the projection": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True},
    "with heads of another width": {"attn_head_dim": 6},
    "with dropout (silent in eval)": {"attn_drop": 0.5, "proj_drop": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_extra_rows_the_attention_is_the_modules_own(variant: str) -> None:
    model = _fused(**VARIANTS[variant])
    remembered = Remembered(model, X)
    width = model[0].qkv.out_features // 3
    attach(model, lambda _: KeyValue(Prefix(0, width), "0"), X, name="empty")
    assert_close(run(model, X), remembered.output)
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize("bias", [False, True])
def test_extra_rows_join_the_softmax(bias: bool) -> None:
    model, form = _fused(qkv_bias=bias), Prefix(3)
    wanted = _explicit(model[0], form, X).detach()
    adapter = attach(model, lambda _: KeyValue(form, "0"), X)
    assert_close(run(model, X), wanted)
    assert_every_tensor_learns(adapter, X)


def test_a_mask_of_the_module_leaves_the_extra_rows_visible() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = _fused()[0]

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.attention(x, attn_mask=mask)

    model, form = Root().eval(), Prefix(3)
    additive = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    wanted = _explicit(model.attention, form, X, additive).detach()
    attach(model, lambda _: KeyValue(form, "attention"), X)
    assert_close(run(model, X, additive), wanted)
    assert_close(run(model, X, additive == 0), wanted)


def test_a_causal_attention_stays_causal() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = _fused()[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, is_causal=True)

    model, form = Root().eval(), Prefix(3)
    causal = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    wanted = _explicit(model.attention, form, X, causal).detach()
    try:
        attach(model, lambda _: KeyValue(form, "attention"), X)
    except tg.GraftError:
        return
    assert_close(run(model, X), wanted)


def test_dropout_acts_on_the_attention_when_it_is_let() -> None:
    model = _fused(attn_drop=0.5)
    attach(model, lambda _: KeyValue(Prefix(3), "0"), X, dropout=True)
    model.train()
    assert not torch.equal(run(model, X), run(model, X))
    tg.detach(model)
    attach(model, lambda _: KeyValue(Prefix(3), "0"), X)
    model.train()
    assert torch.equal(run(model, X), run(model, X))


def test_separate_key_and_value_layers_gain_the_rows_at_their_outputs() -> None:
    torch.manual_seed(0)
    model, form = nn.Sequential(SeparateAttention()).eval(), Prefix(3)
    remembered = Remembered(model, X)
    own = model[0]
    q = own.split(own.query(X))
    k = own.split(torch.cat([form.keys.expand(2, -1, -1), own.key(X)], 1))
    v = own.split(torch.cat([form.values.expand(2, -1, -1), own.value(X)], 1))
    wanted = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2).detach()
    adapter = attach(model, lambda _: KeyValue(form, "0", key="0.key", value="0.value"), X)
    assert_close(run(model, X), wanted)
    assert_every_tensor_learns(adapter, X)
    tg.detach(model)
    remembered.assert_same()


def test_detaching_one_of_two_prefixes_leaves_the_other_a_part_of_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SeparateAttention()).eval()
    make = lambda _: KeyValue(Prefix(3), "0", key="0.key", value="0.value")  # noqa: E731
    attach(model, make, X, name="one")
    two = attach(model, make, X, name="two")
    tg.detach(model, "one")
    held = {id(p) for p in model.parameters()}
    assert [n for n, p in two.named_parameters() if id(p) not in held] == []


# Attention modules that have what a fused timm attention has, and more: position biases, rotary embeddings,
# windows, another order of qkv. Each is served right or refused; quietly dropping the bias would be neither.
OTHERS: dict[str, tuple[str, Callable[[type], nn.Module], tuple[int, ...]]] = {
    "swin": ("swin_transformer.WindowAttention", lambda c: c(8, 2, window_size=2, qkv_bias=True), (2, 4, 8)),
    "swin v2": ("swin_transformer_v2.WindowAttention", lambda c: c(8, (2, 2), 2), (2, 4, 8)),
    "beit": ("beit.Attention", lambda c: c(8, 2, qkv_bias=True, window_size=(2, 2)), (2, 5, 8)),
    "eva": ("eva.EvaAttention", lambda c: c(8, 2, qkv_fused=True, norm_layer=nn.LayerNorm), (2, 5, 8)),
    "relative position": (
        "vision_transformer_relpos.RelPosAttention",
        lambda c: c(8, 2, rel_pos_cls=partial(tl.RelPosBias, (2, 2))),
        (2, 4, 8),
    ),
    "talking heads": ("cait.TalkingHeadAttn", lambda c: c(8, 2), (2, 5, 8)),
    "davit windows": ("davit.WindowAttention", lambda c: c(8, (2, 2), 2), (2, 4, 8)),
    "davit channels": ("davit.ChannelAttention", lambda c: c(8, 2), (2, 4, 8)),
    "tiny vit": ("tiny_vit.Attention", lambda c: c(8, 4, num_heads=2, resolution=(2, 2)), (2, 4, 8)),
    "convit": ("convit.MHSA", lambda c: c(8, 2), (2, 5, 8)),
    "metaformer": ("metaformer.Attention", lambda c: c(8, head_dim=4), (2, 4, 8)),
    "visformer": ("visformer.Attention", lambda c: c(8, 2), (2, 8, 2, 2)),
    "sam": ("vision_transformer_sam.Attention", lambda c: c(8, 2, use_rel_pos=True, input_size=(2, 2)), (2, 2, 2, 8)),
    "torch": ("torch", lambda _: _SelfAttention(), (2, 5, 8)),
}


class _SelfAttention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_attentions_are_served_right_or_refused(kind: str) -> None:
    name, make, shape = OTHERS[kind]
    file, _, cls = name.partition(".")
    torch.manual_seed(0)
    module = make(getattr(importlib.import_module(f"timm.models.{file}"), cls) if cls else nn.Module)
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model, x = nn.Sequential(module).eval(), torch.randn(shape)
    remembered = Remembered(model, x)
    width = module.qkv.weight.shape[0] // 3 if hasattr(module, "qkv") and module.qkv is not None else 8
    try:
        attach(model, lambda _: KeyValue(Prefix(0, width), "0"), x)
    except tg.GraftError as error:
        assert "key_value" in str(error)
        remembered.assert_same()
    else:
        assert_close(run(model, x), remembered.output)


def test_a_module_without_a_fused_layer_is_refused_with_a_hint() -> None:
    model = nn.Sequential(SeparateAttention()).eval()
    with pytest.raises(tg.GraftError, match="SeparateAttention has no fused qkv; name its key and value layers"):
        attach(model, lambda _: KeyValue(Prefix(3), "0"), X)
