"""Branches: where every residual branch of a block starts, what it reads, where it ends and what it adds.

The tables are written from the code of the blocks. ``B`` is the block; a point is ``path<`` (the input of a module) or
``path>`` (its output).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm.models as tm
import torch
import torchvision.models as tv
import transformers as hf
from timm.models import convnext, swin_transformer, swin_transformer_v2
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.anatomy import Anatomy
from torchgraft.core.branches import Branch
from torchgraft.core.graft import first_output, first_tensor
from torchgraft.core.placements import Parallel, Point, Stream

from .attaching import assert_close, attach


@dataclasses.dataclass(frozen=True)
class Row:
    """What a branch must be, and ``sum``: where the stream with the branch added shows next."""

    kind: str
    module: str | None
    norm: str | None
    stream: str
    reads: str
    first: tuple[str, ...]
    last: str
    adds: str
    sum: str


def _pre(
    kind: str, module: str | None, norm: str, first: str, last: str, adds: str, then: str, stream: str | None = None
) -> Row:
    """A branch behind a norm, whose layers are named relative to their module."""
    inside = f"{module}." if module else "B."
    layers = tuple(f"{inside}{name}" for name in first.split())
    return Row(kind, module, norm, stream or f"{norm}<", f"{norm}>", layers, f"{inside}{last}", adds, then)


def _post(
    kind: str, module: str | None, reads: str, first: str, last: str, adds: str, then: str, stream: str | None = None
) -> Row:
    """A branch that reads the stream itself."""
    inside = f"{module}." if module else "B."
    layers = tuple(f"{inside}{name}" for name in first.split())
    return Row(kind, module, None, stream or reads, reads, layers, f"{inside}{last}", adds, then)


def _vit_rows(attn: str, mlp: str, qkv: str = "qkv") -> list[Row]:
    return [
        _pre("attn", "B.attn", "B.norm1", qkv, "proj", attn, "B.norm2<"),
        _pre("mlp", "B.mlp", "B.norm2", "fc1", "fc2", mlp, "B>"),
    ]


def _bert_rows() -> list[Row]:
    return [
        _post("attn", "B.attention", "B.attention<", "self.query self.key self.value", "output.dense",
              "B.attention.output.dropout>", "B.attention.output.LayerNorm<"),
        _post("mlp", None, "B.intermediate.dense<", "intermediate.dense", "output.dense", "B.output.dropout>",
              "B.output.LayerNorm<"),
    ]  # fmt: skip


def _t5(layer: int, name: str, kind: str) -> Row:
    return _pre(kind, f"B.layer.{layer}.{name}", f"B.layer.{layer}.layer_norm", "q k v", "o",
                f"B.layer.{layer}.dropout>", f"B.layer.{layer + 1}.layer_norm<")  # fmt: skip


def _t5_mlp(layer: int, first: str) -> Row:
    return _pre("mlp", f"B.layer.{layer}.DenseReluDense", f"B.layer.{layer}.layer_norm", first, "wo",
                f"B.layer.{layer}.dropout>", f"B.layer.{layer}>")  # fmt: skip


_SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_PIXELS: dict[str, Any] = {"image_size": 32, "patch_size": 8}
_WINDOWS: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4,
}  # fmt: skip
_PAIR: dict[str, Any] = {
    "d_model": 16, "vocab_size": 30, "max_position_embeddings": 32,
    **{f"{side}_{what}": n for side in ("encoder", "decoder")
       for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))},
}  # fmt: skip
_T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 30}
_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
_SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4,
    "num_classes": 3,
}  # fmt: skip
_TV_SWIN: dict[str, Any] = {
    "patch_size": [4, 4], "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": [4, 4],
    "num_classes": 3,
}  # fmt: skip


def _torchvision_swin_v2() -> nn.Module:
    v2 = tv.swin_transformer
    return tv.SwinTransformer(**_TV_SWIN, block=v2.SwinTransformerBlockV2, downsample_layer=v2.PatchMergingV2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, list[Row]]] = {
    "timm ViT": (
        lambda: tm.VisionTransformer(**_VIT, init_values=0.3),
        "blocks.1",
        _vit_rows("B.drop_path1>", "B.drop_path2>"),
    ),
    "timm Swin": (
        lambda: swin_transformer.SwinTransformer(**_SWIN),
        "layers.0.blocks.1",
        _vit_rows("B.drop_path1>", "B.drop_path2>"),
    ),
    "timm Swin V2": (
        lambda: swin_transformer_v2.SwinTransformerV2(**_SWIN),
        "layers.0.blocks.1",
        [  # the attention reads windows, and its norm stands behind it
            _post("attn", "B.attn", "B.attn<", "qkv", "proj", "B.drop_path1>", "B.mlp<", stream="B<"),
            _post("mlp", "B.mlp", "B.mlp<", "fc1", "fc2", "B.drop_path2>", "B>"),
        ],
    ),
    "timm BEiT": (
        lambda: tm.Beit(**_VIT, init_values=0.3, use_abs_pos_emb=False, use_rel_pos_bias=True),
        "blocks.1",
        _vit_rows("B.drop_path1>", "B.drop_path2>"),
    ),
    "timm ConvNeXt": (
        lambda: convnext.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=3, ls_init_value=0.5),
        "stages.1.blocks.1",
        # Inside the two changes of layout, and so in front of the scale: the block keeps that as a bare parameter.
        [_pre("mlp", "B.mlp", "B.norm", "fc1", "fc2", "B.mlp.fc2>", "B.mlp>")],
    ),
    "timm MaxViT": (
        lambda: tm.create_model("test_maxvit", num_classes=3, img_size=64),
        "stages.1.blocks.0",
        [
            row
            for part, then in (("attn_block", "B.attn_grid<"), ("attn_grid", "B.attn_grid>"))
            for row in (
                _pre(
                    "attn",
                    f"B.{part}.attn",
                    f"B.{part}.norm1",
                    "qkv",
                    "proj",
                    f"B.{part}.drop_path1>",
                    f"B.{part}.norm2<",
                ),
                _pre("mlp", f"B.{part}.mlp", f"B.{part}.norm2", "fc1", "fc2", f"B.{part}.drop_path2>", then),
            )
        ],
    ),
    "torchvision ViT": (
        lambda: tv.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
        ),
        "encoder.layers.encoder_layer_1",
        [  # q, k and v are one parameter of the attention, no layer
            _pre("attn", "B.self_attention", "B.ln_1", "", "out_proj", "B.dropout>", "B.ln_2<"),
            _pre("mlp", "B.mlp", "B.ln_2", "0", "3", "B.mlp>", "B>"),
        ],
    ),
    "torchvision Swin": (
        lambda: tv.SwinTransformer(**_TV_SWIN),
        "features.1.1",
        [  # the two branches share one StochasticDepth, which cannot be told apart by its calls
            _pre("attn", "B.attn", "B.norm1", "qkv", "proj", "B.attn>", "B.norm2<"),
            _pre("mlp", "B.mlp", "B.norm2", "0", "3", "B.mlp>", "B>"),
        ],
    ),
    "torchvision Swin V2": (
        _torchvision_swin_v2,
        "features.1.1",
        [
            _post("attn", "B.attn", "B.attn<", "qkv", "proj", "B.norm1>", "B.mlp<"),
            _post("mlp", "B.mlp", "B.mlp<", "0", "3", "B.norm2>", "B>"),
        ],
    ),
    "HF ViT": (
        lambda: hf.ViTModel(hf.ViTConfig(**_SMALL, **_PIXELS)),
        "layers.1",
        [
            _pre(
                "attn",
                "B.attention",
                "B.layernorm_before",
                "q_proj k_proj v_proj",
                "o_proj",
                "B.attention>",
                "B.layernorm_after<",
            ),
            _pre("mlp", "B.mlp", "B.layernorm_after", "fc1", "fc2", "B.mlp>", "B>"),
        ],
    ),
    "HF DINOv2": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**_SMALL, **_PIXELS, mlp_ratio=2, layerscale_value=0.3)),
        "encoder.layer.1",
        [
            _pre("attn", "B.attention", "B.norm1", "q_proj k_proj v_proj", "o_proj", "B.layer_scale1>", "B.norm2<"),
            _pre("mlp", "B.mlp", "B.norm2", "fc1", "fc2", "B.layer_scale2>", "B>"),
        ],
    ),
    "HF Swin": (
        lambda: hf.SwinModel(hf.SwinConfig(**_WINDOWS)),
        "encoder.layers.0.blocks.1",
        [  # drop_path sees the attention's windows put together again; the MLP has only a shared dropout behind it
            _pre(
                "attn",
                "B.attention",
                "B.layernorm_before",
                "q_proj k_proj v_proj",
                "o_proj",
                "B.drop_path>",
                "B.layernorm_after<",
            ),
            _pre("mlp", "B.mlp", "B.layernorm_after", "fc1", "fc2", "B.mlp>", "B>"),
        ],
    ),
    "HF BERT": (
        lambda: hf.BertModel(hf.BertConfig(**_SMALL, vocab_size=30)),
        "encoder.layer.1",
        _bert_rows(),
    ),
    "HF RoBERTa": (
        lambda: hf.RobertaModel(hf.RobertaConfig(**_SMALL, vocab_size=30)),
        "encoder.layer.1",
        _bert_rows(),
    ),
    "HF BART encoder": (
        lambda: hf.BartModel(hf.BartConfig(**_PAIR)),
        "encoder.layers.1",
        [
            _post(
                "attn",
                "B.self_attn",
                "B.self_attn<",
                "k_proj v_proj q_proj",
                "out_proj",
                "B.self_attn>",
                "B.self_attn_layer_norm<",
            ),
            _post("mlp", None, "B.fc1<", "fc1", "fc2", "B.fc2>", "B.final_layer_norm<"),
        ],
    ),
    "HF BART decoder": (
        lambda: hf.BartModel(hf.BartConfig(**_PAIR)),
        "decoder.layers.1",
        [
            _post(
                "attn",
                "B.self_attn",
                "B.self_attn<",
                "k_proj v_proj q_proj",
                "out_proj",
                "B.self_attn>",
                "B.self_attn_layer_norm<",
            ),
            _post(
                "cross",
                "B.encoder_attn",
                "B.encoder_attn<",
                "k_proj v_proj q_proj",
                "out_proj",
                "B.encoder_attn>",
                "B.encoder_attn_layer_norm<",
            ),
            _post("mlp", None, "B.fc1<", "fc1", "fc2", "B.fc2>", "B.final_layer_norm<"),
        ],
    ),
    "HF MBART encoder": (
        lambda: hf.MBartModel(hf.MBartConfig(**_PAIR)),
        "encoder.layers.1",
        [
            _pre(
                "attn",
                "B.self_attn",
                "B.self_attn_layer_norm",
                "k_proj v_proj q_proj",
                "out_proj",
                "B.self_attn>",
                "B.final_layer_norm<",
            ),
            _pre("mlp", None, "B.final_layer_norm", "fc1", "fc2", "B.fc2>", "B>"),
        ],
    ),
    "HF T5 encoder": (
        lambda: hf.T5Model(hf.T5Config(**_T5, feed_forward_proj="gated-gelu")),
        "encoder.block.1",
        [_t5(0, "SelfAttention", "attn"), _t5_mlp(1, "wi_0 wi_1")],
    ),
    "HF T5 decoder": (
        lambda: hf.T5Model(hf.T5Config(**_T5)),
        "decoder.block.1",
        [_t5(0, "SelfAttention", "attn"), _t5(1, "EncDecAttention", "cross"), _t5_mlp(2, "wi")],
    ),
}
"""Name -> (network, the block that is looked at, its branches)."""

CASES = [(name, i) for name, (_, _, rows) in NETWORKS.items() for i in range(len(rows))]


@functools.cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@functools.cache
def anatomy(name: str) -> Anatomy:
    return Anatomy(network(name))


def found(name: str) -> list[Branch]:
    return [b for b in anatomy(name).branches() if b.block == NETWORKS[name][1]]


def point(text: str, block: str) -> Point:
    return Point(_path(text[:-1], block), "input" if text.endswith("<") else "output")


def _path(text: str, block: str) -> str:
    return block + text.removeprefix("B")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_block_has_these_branches_in_the_order_in_which_they_run(name: str) -> None:
    assert [b.kind for b in found(name)] == [row.kind for row in NETWORKS[name][2]]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["attn", "cross", "mlp"])
def test_branches_can_be_asked_for_by_kind(name: str, kind: str) -> None:
    assert anatomy(name).branches(kind) == [b for b in anatomy(name).branches() if b.kind == kind]


@pytest.mark.parametrize("part", ["module", "norm", "stream", "reads", "first", "last", "adds"])
@pytest.mark.parametrize(("name", "i"), CASES)
def test_every_part_of_a_branch_is_found(name: str, i: int, part: str) -> None:
    _, block, rows = NETWORKS[name]
    wanted: Any = getattr(rows[i], part)
    if part in ("stream", "reads", "adds"):
        wanted = point(wanted, block)
    elif part == "first":
        wanted = tuple(_path(path, block) for path in wanted)
    elif wanted is not None:
        wanted = _path(wanted, block)
    assert getattr(found(name)[i], part) == wanted


@pytest.mark.parametrize(("name", "i"), CASES)
def test_what_is_added_has_the_shape_of_the_stream(name: str, i: int) -> None:
    # Swin's blocks change between (B, H, W, C) and (B, H * W, C); Swin V2 does so in the middle of a branch.
    shapes = [anatomy(name).shape(p) for p in (found(name)[i].stream, found(name)[i].adds)]
    assert math.prod(shapes[0]) == math.prod(shapes[1])
    assert shapes[0][0] == shapes[1][0] == 1


@pytest.mark.parametrize(("name", "i"), CASES)
def test_a_constant_added_at_adds_shifts_the_stream_by_exactly_that(name: str, i: int) -> None:
    branch, model = found(name)[i], network(name)
    shows = point(NETWORKS[name][2][i].sum, branch.block)
    before = seen(name, shows)
    form = Constant(anatomy(name).channels(shows, anatomy(name).layout(shows)), first_axis(name, branch.adds))
    attach(model, lambda _: Parallel(form, Point(branch.adds.path, "input"), branch.adds))
    try:
        after = seen(name, shows)
    finally:
        tg.detach(model)
    form.first = first_axis(name, shows)
    torch.testing.assert_close(after - before, form(before).expand_as(before), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["timm ViT", "HF DINOv2", "HF BERT"])
def test_a_change_between_the_branches_is_carried_by_the_skip_connection(name: str) -> None:
    branch, model = found(name)[-1], network(name)
    block = model.get_submodule(branch.block)
    form = nn.Linear(16, 16)
    inputs = seen(name, Point(branch.block, "input"))
    wanted = BY_HAND[name](block, inputs, form).detach()
    plain = seen(name, Point(branch.block, "output"))
    attach(model, lambda _: Stream(form, branch.stream, carry=branch.adds))
    try:
        changed = seen(name, Point(branch.block, "output"))
    finally:
        tg.detach(model)
    assert_close(changed, wanted)
    assert not torch.allclose(plain, wanted, atol=0.05)


def _vit_block(block: Any, x: Tensor, form: nn.Module) -> Tensor:
    x = x + block.ls1(block.attn(block.norm1(x)))
    x = x + form(x)
    return x + block.ls2(block.mlp(block.norm2(x)))


def _dinov2_layer(layer: Any, x: Tensor, form: nn.Module) -> Tensor:
    x = x + layer.layer_scale1(layer.attention(layer.norm1(x))[0])
    x = x + form(x)
    return x + layer.layer_scale2(layer.mlp(layer.norm2(x)))


def _bert_layer(layer: Any, x: Tensor, form: nn.Module) -> Tensor:
    x = layer.attention(x)[0]
    x = x + form(x)
    return layer.output(layer.intermediate(x), x)


BY_HAND = {"timm ViT": _vit_block, "HF DINOv2": _dinov2_layer, "HF BERT": _bert_layer}
"""The forward of a block with the form between its branches, written out."""


def test_a_constant_behind_layer_scale_is_not_one_in_front_of_it() -> None:
    # What sets `adds` apart from `returns`: the same constant at the MLP's output comes out scaled.
    name = "timm ViT"
    branch, model = found(name)[1], network(name)
    end = Point(branch.block, "output")
    before, form = seen(name, end), Constant(16, first=False)
    attach(model, lambda _: Parallel(form, Point(branch.returns.path, "input"), branch.returns))
    try:
        after = seen(name, end)
    finally:
        tg.detach(model)
    scale = model.get_submodule(f"{branch.block}.ls2").gamma
    torch.testing.assert_close(after - before, (scale * form.shift).expand_as(before), rtol=0, atol=2e-5)


class Constant(nn.Module):
    """A number per channel, whatever it is given; with ``first`` channels stand second, as in a map."""

    def __init__(self, channels: int, first: bool) -> None:
        super().__init__()
        self.shift, self.first = nn.Parameter(torch.linspace(-1, 1, channels)), first

    def forward(self, x: Tensor) -> Tensor:
        return self.shift[:, None, None] if self.first else self.shift


def first_axis(name: str, at: Point) -> bool:
    return anatomy(name).layout(at).name == "NC..."


@torch.no_grad()
def seen(name: str, at: Point) -> Tensor:
    """The tensor at a point, in a forward of the network on random numbers."""
    model, (args, kwargs) = network(name), anatomy(name).trace.example  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    kept: list[Tensor] = []

    def drawn(t: Tensor) -> Tensor:
        return (
            torch.randn(t.shape, generator=generator)
            if t.is_floating_point()
            else torch.randint(3, 30, t.shape, generator=generator)
        )

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept.append(first_tensor(args, kwargs).clone())

    def after(module: nn.Module, args: Any, out: Any) -> None:
        kept.append(first_output(out).clone())

    module = model.get_submodule(at.path)
    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if at.side == "input"
        else module.register_forward_hook(after)
    )
    try:
        model(*map(drawn, args), **{k: drawn(v) for k, v in kwargs.items()})
    finally:
        handle.remove()
    assert len(kept) == 1, f"the {at} was seen {len(kept)} times"
    return kept[0]
