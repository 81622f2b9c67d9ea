"""KeyValue: learned keys and values inside attention, against an explicit softmax."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
import transformers as hf
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

import torchgraft as tg
from torchgraft.core.placements import KeyValue, Placement
from torchgraft.core.placements.key_value import Compose

from ..attaching import Placed, Remembered, assert_close, assert_every_tensor_learns, attach, disturb, run

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Prefix(nn.Module):
    def __init__(self, count: int, width: int = 8, values: int | None = None) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(count, width))
        self.values = nn.Parameter(torch.randn(count, width if values is None else values))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class SeparateAttention(nn.Module):
    """Attention with layers of its own for queries, keys and values."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads = heads

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class OwnSoftmax(SeparateAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """An ``nn.MultiheadAttention`` over one sequence."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, **options)


def moved(model: nn.Module) -> nn.Module:
    """Every parameter away from its start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def add(model: nn.Module, path: str, form: nn.Module, *inputs: Tensor, compose: Compose = "joint") -> tg.Adapter:
    return attach(model, lambda a: KeyValue(form, path, a.module(path), compose=compose), *inputs)


def explicit(module: Any, form: Prefix, x: Tensor, mask: Tensor | None = None, compose: str = "joint") -> Tensor:
    """The formulas of the class docstring, head by head, for a timm attention."""
    d = 8 // module.num_heads
    q, k, v = module.qkv(x).chunk(3, -1)
    heads = []
    for h in range(module.num_heads):
        own = slice(h * d, (h + 1) * d)
        scores = q[..., own] @ k[..., own].mT / d**0.5
        scores = scores if mask is None else scores + mask
        extra = q[..., own] @ form.keys[:, own].mT / d**0.5
        if compose == "joint":
            weights = torch.cat([extra, scores], -1).softmax(-1)
            heads.append(
                weights[..., : len(form.keys)] @ form.values[:, own] + weights[..., len(form.keys) :] @ v[..., own]
            )
        else:
            other = extra.softmax(-1) if compose == "apart" else extra.relu()
            heads.append(scores.softmax(-1) @ v[..., own] + other @ form.values[:, own])
    return module.proj(torch.cat(heads, -1))


@pytest.mark.parametrize("compose", ["joint", "apart", "relu"])
@pytest.mark.parametrize("fused", [True, False])
def test_learned_keys_and_values_act_as_the_formula_says(compose: Compose, fused: bool) -> None:
    model, form = moved(nn.Sequential(tl.Attention(8, num_heads=2, qkv_bias=True))), Prefix(3)
    model[0].fused_attn = fused
    wanted = explicit(model[0], form, X, compose=compose).detach()
    remembered = Remembered(model, X)
    adapter = add(model, "0", form, X, compose=compose)
    assert_close(run(model, X), wanted)
    assert_every_tensor_learns(adapter, X)
    tg.detach(model)
    remembered.assert_same()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = tl.Attention(8, num_heads=2)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return self.attention(x, attn_mask=mask, is_causal=causal)


@pytest.mark.parametrize("compose", ["joint", "apart", "relu"])
def test_masks_and_causality_leave_the_learned_keys_visible(compose: Compose) -> None:
    model, form = moved(Masked()), Prefix(3)
    additive = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    wanted = explicit(model.attention, form, X, additive, compose).detach()
    add(model, "attention", form, X, compose=compose)
    assert_close(run(model, X, additive), wanted)
    assert_close(run(model, X, additive == 0), wanted)
    assert_close(run(model, X, None, True), wanted)


def test_a_mask_that_is_the_same_for_every_key_is_widened() -> None:
    model, form = moved(Masked()), Prefix(3)
    wanted = explicit(model.attention, form, X, torch.full((5, 1), -2.0)).detach()
    add(model, "attention", form, X)
    assert_close(run(model, X, torch.full((5, 1), -2.0)), wanted)


def test_dropout_acts_on_the_attention_when_it_is_let() -> None:
    model = nn.Sequential(tl.Attention(8, num_heads=2, attn_drop=0.5))
    attach(model, lambda a: KeyValue(Prefix(3), "0", a.module("0")), X, dropout=True)
    model.train()
    assert not torch.equal(run(model, X), run(model, X))
    tg.detach(model)
    add(model, "0", Prefix(3), X)
    model.train()
    assert torch.equal(run(model, X), run(model, X))


def test_separate_layers_for_queries_keys_and_values_are_served() -> None:
    model, form = nn.Sequential(moved(SeparateAttention())), Prefix(3)
    own = model[0]
    q = own.split(own.query(X))
    k = own.split(torch.cat([form.keys.expand(2, -1, -1), own.key(X)], 1))
    v = own.split(torch.cat([form.values.expand(2, -1, -1), own.value(X)], 1))
    wanted = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2).detach()
    adapter = add(model, "0", form, X)
    assert_close(run(model, X), wanted)
    assert_every_tensor_learns(adapter, X)


def test_an_attention_with_a_softmax_of_its_own_is_refused_and_left_alone() -> None:
    model = nn.Sequential(moved(OwnSoftmax()))
    remembered = Remembered(model, X)
    with pytest.raises(tg.GraftError, match="OwnSoftmax calls no attention function whose keys could be extended"):
        add(model, "0", Prefix(3), X)
    remembered.assert_same()


def test_rows_of_another_width_are_an_error_that_names_the_heads() -> None:
    model = moved(nn.Sequential(tl.Attention(8, num_heads=2)))
    add(model, "0", Prefix(3, 6), X)
    with pytest.raises(tg.GraftError, match="rows of 6 are given; expected 2 heads of 4"):
        model(X)


# -- every kind of attention module ---------------------------------------------------------------------

# name: module, shape of its input; served by extending its own softmax, whatever it adds to the scores.
SERVED: dict[str, tuple[str, Callable[[type], nn.Module], tuple[int, ...]]] = {
    "attention": ("vision_transformer.Attention", lambda c: c(8, 2, qkv_bias=True), (2, 5, 8)),
    "normed queries and keys": (
        "vision_transformer.Attention",
        lambda c: c(8, 2, qk_norm=True, norm_layer=nn.LayerNorm),
        (2, 5, 8),
    ),
    "gated": ("vision_transformer.Attention", lambda c: c(8, 2, gated=True), (2, 5, 8)),
    "wider heads": ("vision_transformer.Attention", lambda c: c(8, 2, attn_head_dim=6), (2, 5, 8)),
    "swin": ("swin_transformer.WindowAttention", lambda c: c(8, 2, window_size=2, qkv_bias=True), (4, 4, 8)),
    "beit": ("beit.Attention", lambda c: c(8, 2, qkv_bias=True, window_size=(2, 2)), (2, 5, 8)),
    "eva": ("eva.EvaAttention", lambda c: c(8, 2, qkv_fused=False, norm_layer=nn.LayerNorm), (2, 5, 8)),
    "relative position": (
        "vision_transformer_relpos.RelPosAttention",
        lambda c: c(8, 2, rel_pos_cls=partial(tl.RelPosBias, (2, 2))),
        (2, 4, 8),
    ),
    "maxvit": (
        "maxxvit.AttentionCl",
        lambda c: c(8, dim_head=4, rel_pos_cls=partial(tl.RelPosBias, (2, 2))),
        (2, 2, 2, 8),
    ),
    "coatnet": ("maxxvit.Attention2d", lambda c: c(8, dim_head=4), (2, 8, 2, 2)),
    "davit windows": ("davit.WindowAttention", lambda c: c(8, (2, 2), 2), (2, 4, 8)),
    "tiny vit": ("tiny_vit.Attention", lambda c: c(8, 4, num_heads=2, resolution=(2, 2)), (2, 4, 8)),
    "metaformer": ("metaformer.Attention", lambda c: c(8, head_dim=4), (2, 4, 8)),
    "visformer": ("visformer.Attention", lambda c: c(8, 2), (2, 8, 2, 2)),
    "nest": ("nest.Attention", lambda c: c(8, 2), (2, 2, 5, 8)),
    "twins": ("twins.LocallyGroupedAttn", lambda c: c(8, 2, ws=2), (2, 16, 8)),
    "pvt": ("pvt_v2.Attention", lambda c: c(8, 2, sr_ratio=1, linear_attn=False), (2, 4, 8)),
    "sam": ("vision_transformer_sam.Attention", lambda c: c(8, 2, use_rel_pos=True, input_size=(2, 2)), (2, 2, 2, 8)),
}
# Those whose scores are made, or whose softmax is followed, by something that more keys do not fit into.
REFUSED: dict[str, tuple[str, Callable[[type], nn.Module], tuple[int, ...]]] = {
    "swin v2": ("swin_transformer_v2.WindowAttention", lambda c: c(8, (2, 2), 2), (2, 4, 8)),
    "talking heads": ("cait.TalkingHeadAttn", lambda c: c(8, 2), (2, 5, 8)),
    "davit channels": ("davit.ChannelAttention", lambda c: c(8, 2), (2, 4, 8)),
    "convit": ("convit.MHSA", lambda c: c(8, 2), (2, 5, 8)),
    "cross covariance": ("xcit.XCA", lambda c: c(8, 2), (2, 5, 8)),
}


class Caller(nn.Module):
    """Calls a timm attention as its block does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.attention = module

    def forward(self, x: Tensor) -> Tensor:
        grid = {"LocallyGroupedAttn": ((4, 4),), "pvt_v2": ((2, 2),)}
        kind = type(self.attention).__name__.removeprefix("Grafted")
        return self.attention(x, *grid.get(kind, grid.get(type(self.attention).__module__.rpartition(".")[2], ())))


def _caller(kind: str, kinds: dict[str, Any]) -> tuple[Caller, Tensor]:
    name, make, shape = kinds[kind]
    file, _, cls = name.partition(".")
    torch.manual_seed(0)
    module = make(getattr(importlib.import_module(f"timm.models.{file}"), cls))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return Caller(module).eval(), torch.randn(shape)


def _widths(module: Any) -> tuple[int, int]:
    if hasattr(module, "val_dim"):
        return module.num_heads * module.key_dim, module.num_heads * module.val_dim
    layer = next(getattr(module, n) for n in ("qkv", "k_proj", "kv") if getattr(module, n, None) is not None)
    parts = {"qkv": 3, "kv": 2}
    width = layer.weight.shape[0] // next((n for name, n in parts.items() if layer is getattr(module, name, None)), 1)
    return width, width


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Prefix]]:
    """Within a test, every fused attention of the process sees the prefix put into the list, by plain operations."""
    forms: list[Prefix] = []
    own = F.scaled_dot_product_attention

    def plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, scale: Any = None, **_: Any) -> Tensor:
        if not forms:
            return own(q, k, v, attn_mask=attn_mask, scale=scale)
        heads_of = forms[0].keys.shape[1] // k.shape[-1]
        if q.dim() == 3:  # heads folded into the batch
            q, k, v = (t.unflatten(0, (-1, heads_of)) for t in (q, k, v))
            attn_mask = None if attn_mask is None else attn_mask.view(*q.shape[:3], -1)
            return plain(q, k, v, attn_mask, scale).flatten(0, 1)
        axis = 1 if heads_of == k.shape[1] else 2
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if attn_mask is None else scores + attn_mask
        heads = []
        for h in range(k.shape[axis]):
            rows = slice(h * k.shape[-1], (h + 1) * k.shape[-1])
            keys = forms[0].keys[:, rows]
            values = forms[0].values[:, h * v.shape[-1] : (h + 1) * v.shape[-1]]
            extra = q.select(axis, h) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
            weights = torch.cat([extra, scores.select(axis, h)], -1).softmax(-1)
            heads.append(
                weights @ torch.cat([values.expand(*v.select(axis, h).shape[:-2], -1, -1), v.select(axis, h)], -2)
            )
        return torch.stack(heads, axis)

    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    yield forms


@pytest.mark.parametrize("kind", SERVED)
def test_modules_of_timm_keep_what_they_add_to_the_scores(kind: str, reference: list[Prefix]) -> None:
    model, x = _caller(kind, SERVED)
    plain = run(model, x)
    form = Prefix(3, *_widths(model.attention))
    model.attention.fused_attn = True
    reference.append(form)
    wanted = run(model, x)
    reference.clear()
    model.attention.fused_attn = False
    assert not torch.allclose(wanted, plain, rtol=1e-3, atol=1e-3)
    remembered = Remembered(model, x)
    adapter = add(model, "attention", form, x)
    assert_close(run(model, x), wanted, 1e-4)
    assert_every_tensor_learns(adapter, x)
    tg.detach(model)
    remembered.assert_same()


@pytest.mark.parametrize("kind", SERVED)
def test_without_learned_keys_the_attention_is_the_modules_own(kind: str) -> None:
    model, x = _caller(kind, SERVED)
    wanted = run(model, x)
    add(model, "attention", Prefix(0, *_widths(model.attention)), x)
    assert_close(run(model, x), wanted, 1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_modules_that_further_keys_do_not_fit_are_refused_with_the_reason(kind: str) -> None:
    model, x = _caller(kind, REFUSED)
    remembered = Remembered(model, x)
    with pytest.raises(tg.GraftError, match=r"cannot take key_value: \w+ (calls no attention|attends over channels)"):
        add(model, "attention", Prefix(3), x)
    remembered.assert_same()


def test_rotary_positions_turn_the_modules_own_keys_alone(reference: list[Prefix]) -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = EvaAttention(8, 2, num_prefix_tokens=1, norm_layer=nn.LayerNorm)

        def forward(self, x: Tensor, rope: Tensor) -> Tensor:
            return self.attention(x, rope=rope)

    model, form = moved(Rotated()), Prefix(3)
    rope = tl.RotaryEmbeddingCat(4, in_pixels=False, feat_shape=(2, 2)).get_embed()
    reference.append(form)
    wanted = run(model, X, rope)
    reference.clear()
    add(model, "attention", form, X, rope)
    assert_close(run(model, X, rope), wanted)


# -- torch and torchvision ------------------------------------------------------------------------------


def test_one_learned_row_of_torchs_attention_is_its_own_bias_k_and_bias_v() -> None:
    biased = moved(SelfAttention(add_bias_kv=True))
    plain, form = moved(SelfAttention()), Prefix(1)
    state = biased.state_dict()
    with torch.no_grad():
        form.keys.copy_(state.pop("attention.bias_k")[0])
        form.values.copy_(state.pop("attention.bias_v")[0])
    plain.load_state_dict(state)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    adapter = attach(plain, lambda a: KeyValue(form, "attention", a.module("attention")), X)
    for options in (
        {},
        {"need_weights": False},
        {"key_padding_mask": padding, "need_weights": False},
        {"attn_mask": causal},
        {"attn_mask": torch.randn(4, 5, 5), "key_padding_mask": padding.float() * -9.0},
    ):
        with torch.no_grad():
            (out, weights), (wanted, theirs) = plain(X, **options), biased(X, **options)
        assert_close(out, wanted)
        assert (weights is None) == (theirs is None)
        if weights is not None:  # theirs has the extra column at the end
            assert_close(weights, theirs.roll(1, -1))
    with torch.no_grad():  # torch itself hides the extra row when it is told that the mask is causal
        assert_close(plain(X, attn_mask=causal, is_causal=True, need_weights=False)[0], plain(X, attn_mask=causal)[0])
    assert_every_tensor_learns(adapter, X)


@pytest.mark.parametrize(
    "options", [{"batch_first": False}, {"bias": False}, {"add_zero_attn": True}, {"kdim": 8, "add_bias_kv": True}]
)
def test_torchs_attention_without_learned_rows_is_its_own(options: dict[str, Any]) -> None:
    model = moved(SelfAttention(**options))
    if "kdim" in options:
        model.attention = nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True, add_bias_kv=True).eval()
        model.attention._qkv_same_embed_dim = True
    batches = [X, X[0]]
    wanted = [run(model, x) for x in batches]
    add(model, "attention", Prefix(0), X)
    for x, out in zip(batches, wanted, strict=True):
        assert_close(run(model, x), out)


def test_torchs_attention_reads_another_sequence_of_another_width() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(x, k, v, average_attn_weights=False)

    model = moved(Cross())
    k, v = torch.randn(2, 7, 6), torch.randn(2, 7, 4)
    with torch.no_grad():
        out, weights = model(X, k, v)
        attach(model, lambda a: KeyValue(Prefix(0), "attention", a.module("attention")), X, k, v)
        found, theirs = model(X, k, v)
    assert_close(found, out)
    assert_close(theirs, weights)


def test_a_subclass_of_torchs_attention_with_a_forward_of_its_own_is_refused() -> None:
    class Odd(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x, x)[0] * 2

    model = nn.Sequential(Odd(8, 2, batch_first=True)).eval()
    with pytest.raises(tg.GraftError, match="Odd calls no attention function"):
        add(model, "0", Prefix(3), X)


@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (1, 0)])
@pytest.mark.parametrize("side", [8, 7, 4])
def test_torchvisions_windows_without_learned_rows_are_its_own(shift: tuple[int, int], side: int) -> None:
    model = moved(nn.Sequential(ShiftedWindowAttention(8, [4, 4], list(shift), 2)))
    x = torch.randn(2, side, side, 8)
    wanted = run(model, x)
    add(model, "0", Prefix(0), x)
    assert_close(run(model, x), wanted)


def test_torchvisions_windows_share_learned_rows_as_timms_do() -> None:
    torchvision = moved(nn.Sequential(ShiftedWindowAttention(8, [4, 4], [0, 0], 2)))
    timm = nn.Sequential(WindowAttention(8, 2, window_size=4)).eval()
    state = {k: v for k, v in torchvision.state_dict().items() if not k.endswith("index")}
    timm.load_state_dict(state, strict=False)
    x, form = torch.randn(2, 8, 8, 8), Prefix(3)
    windows = x.view(2, 2, 4, 2, 4, 8).transpose(2, 3).reshape(8, 16, 8)
    add(torchvision, "0", form, x)
    add(timm, "0", copy.deepcopy(form), windows)
    wanted = run(timm, windows).view(2, 2, 2, 4, 4, 8).transpose(2, 3).reshape(2, 8, 8, 8)
    assert_close(run(torchvision, x), wanted)


# -- transformers ---------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
IMAGE: dict[str, Any] = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
}
IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, 1, 1]])
PADDED = {"input_ids": IDS, "attention_mask": (IDS != 1).long()}
DECODED = {**PADDED, "decoder_input_ids": torch.tensor([[2, 5, 6, 7], [2, 9, 10, 1]])}
PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
HOSTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], tuple[str, ...]]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**TEXT)), PADDED, ("encoder.layer.0.attention.self",)),
    "bert as a decoder": (
        lambda: hf.BertModel(hf.BertConfig(**TEXT, is_decoder=True)),
        {"input_ids": IDS},
        ("encoder.layer.0.attention.self",),
    ),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)), PADDED, ("encoder.layer.0.attention.self",)),
    "bart": (
        lambda: hf.BartModel(hf.BartConfig(**SEQ2SEQ)),
        DECODED,
        ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"),
    ),
    "mbart": (
        lambda: hf.MBartModel(hf.MBartConfig(**SEQ2SEQ)),
        DECODED,
        ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"),
    ),
    "t5": (
        lambda: hf.T5Model(hf.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
        DECODED,
        (
            "encoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.1.EncDecAttention",
        ),
    ),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), PIXELS, ("layers.0.attention",)),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE)), PIXELS, ("encoder.layer.0.attention",)),
    "clip vision": (
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)),
        PIXELS,
        ("encoder.layers.0.self_attn",),
    ),
    "clip text": (
        lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT, eos_token_id=2)),
        PADDED,
        ("encoder.layers.0.self_attn",),
    ),
    "llama": (
        lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=1)),
        PADDED,
        ("layers.0.self_attn",),
    ),
}


def _host(kind: str, implementation: str) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    make, inputs, paths = HOSTS[kind]
    torch.manual_seed(0)
    model: Any = moved(make())
    model.set_attn_implementation(implementation)
    modules = dict(model.named_modules())
    found = [next(p for p in modules if p == path or p.endswith(f".{path}")) for path in paths]
    return model, inputs, found


def _out(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def _prefixes(model: nn.Module, paths: list[str]) -> dict[str, Prefix]:
    torch.manual_seed(3)
    widths = {p: next(m for n, m in model.get_submodule(p).named_modules() if n[:1] == "k") for p in paths}
    return {p: Prefix(3, layer.out_features) for p, layer in widths.items()}


def _attach_all(model: nn.Module, forms: dict[str, Prefix], inputs: dict[str, Tensor]) -> tg.Adapter:
    make = lambda a: [KeyValue(f, p, a.module(p)) for p, f in forms.items()]  # noqa: E731
    return tg.attach(model, Placed(make), example=((), inputs))


@pytest.mark.parametrize("kind", HOSTS)
def test_models_of_transformers_see_the_learned_keys_under_their_masks(kind: str, monkeypatch) -> None:
    model, inputs, paths = _host(kind, "eager")
    forms = _prefixes(model, paths)
    plain = _out(model, inputs)
    by_module = {id(model.get_submodule(p)): form for p, form in forms.items()}

    def eager(module, q, k, v, mask, scaling=None, dropout=0.0, position_bias=None, **_):
        form, groups = by_module[id(module)], q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        keys, values = (t.view(3, -1, k.shape[-1]).transpose(0, 1) for t in (form.keys, form.values))
        keys, values = (t.repeat_interleave(groups, 0).expand(len(q), -1, -1, -1) for t in (keys, values))
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        scores = q @ k.mT * scaling
        scores = scores if mask is None else scores + mask
        scores = scores if position_bias is None else scores + position_bias
        weights = torch.cat([q @ keys.mT * scaling, scores], -1).softmax(-1)
        return (weights @ torch.cat([values, v], 2)).transpose(1, 2), weights

    home = importlib.import_module(type(model.get_submodule(paths[0])).__module__)
    with monkeypatch.context() as patch:
        patch.setattr(home, "eager_attention_forward", eager)
        wanted = _out(model, inputs)
    assert not torch.allclose(plain, wanted, rtol=1e-3, atol=1e-3)
    adapter = _attach_all(model, forms, inputs)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert_close(_out(model, inputs), wanted, 1e-4)
    model(**inputs)[0].square().sum().backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    tg.detach(model)
    assert_close(_out(model, inputs), plain, 1e-4)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_decoder_with_a_cache_generates_as_without_one(kind: str) -> None:
    language = {
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, forced_eos_token_id=None)),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
    }
    torch.manual_seed(0)
    model: Any = moved(language[kind]())
    paths = [p for p, m in model.named_modules() if type(m).__name__ in ("BartAttention", "T5Attention")]
    adapter = disturb(_attach_all(model, _prefixes(model, paths), DECODED), 2.0)
    assert len(adapter.placements) == len(paths)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "output_scores": True}
    runs = [
        model.generate(**PADDED, use_cache=cached, return_dict_in_generate=True, **options) for cached in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for cached, plain in zip(runs[0].scores, runs[1].scores, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)


def test_an_attention_implementation_without_masks_by_column_is_refused() -> None:
    model, inputs, paths = _host("vit", "sdpa")
    _attach_all(model, _prefixes(model, paths), inputs)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(tg.GraftError, match="'flash_attention_2' takes no mask by column; set 'sdpa' or 'eager'"):
        model(**inputs)
    support = KeyValue.supports(model.get_submodule(paths[0]))
    assert not support.forward
    assert "runs flash_attention_2, which takes no mask by column" in support.reason


# -- copies, several adapters, compilers ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class First(tg.Method):
    """Keys and values at the first module of a model."""

    name: ClassVar[str] = "first"

    def placements(self, anatomy: tg.Anatomy) -> list[Placement]:
        return [KeyValue(Prefix(3), "0", anatomy.module("0"))]


def test_copies_of_an_adapted_model_run_their_own_rows() -> None:
    model = moved(nn.Sequential(tl.Attention(8, num_heads=2)))
    tg.attach(model, First(), example=((X,), {}))
    out = run(model, X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, X), out)
        placement = tg.adapters(twin)["default"].placements[0][1]
        assert placement.host[0] is twin[0]
        disturb(tg.adapters(twin)["default"])
        assert not torch.equal(run(twin, X), out)
        assert torch.equal(run(model, X), out)


def test_detaching_one_of_two_prefixes_leaves_the_other_a_part_of_the_model() -> None:
    model = moved(nn.Sequential(SeparateAttention()))
    make = lambda a: KeyValue(Prefix(3), "0", a.module("0"))  # noqa: E731
    attach(model, make, X, name="one")
    two = attach(model, make, X, name="two")
    tg.detach(model, "one")
    held = {id(p) for p in model.parameters()}
    assert [n for n, p in two.named_parameters() if id(p) not in held] == []


COMPILED: dict[str, Callable[[], tuple[nn.Module, dict[str, Any], list[str]]]] = {
    "timm": lambda: (moved(nn.Sequential(tl.Attention(8, num_heads=2))), {"input": X}, ["0"]),
    "torch": lambda: (moved(SelfAttention()), {"x": X, "need_weights": False}, ["attention"]),
    "torchvision": lambda: (
        moved(nn.Sequential(ShiftedWindowAttention(8, [4, 4], [2, 2], 2))),
        {"input": torch.randn(2, 8, 8, 8)},
        ["0"],
    ),
    "transformers": lambda: _host("vit", "sdpa"),
}


@pytest.mark.parametrize(
    "kind", [k if k != "torchvision" else pytest.param(k, marks=pytest.mark.slow) for k in COMPILED]
)
def test_adapted_attention_compiles_as_one_graph_and_exports(kind: str) -> None:
    model, inputs, paths = COMPILED[kind]()
    forms = {p: Prefix(3) for p in paths}
    _attach_all(model, forms, inputs)
    with torch.no_grad():
        wanted = model(**inputs)
        found = torch.compile(model, fullgraph=True, backend="eager")(**inputs)

    def first(out: Any) -> Tensor:
        if isinstance(out, Tensor):
            return out
        return next(iter(out.values())) if isinstance(out, dict) else out[0]

    assert_close(first(found), first(wanted))
    program = torch.export.export(model, (), inputs)
    assert_close(first(program.module()(**inputs)).detach(), first(wanted))
