from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import nn

import torchgraft as tg

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "num_labels": 5}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_labels": 5}

SEPARATE = {"attn": 1, "attn.q": 1, "attn.k": 1, "attn.v": 1, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
FUSED = {"attn": 1, "attn.qkv": 1, "attn.proj": 1, "mlp": 1, "mlp.fc1": 1, "mlp.fc2": 1, "norm": 2}


def on_meta(name: str, **options: Any) -> tg.Anatomy:
    with torch.device("meta"):
        return tg.anatomy(timm.create_model(name, **options))


def roles(anatomy: tg.Anatomy, block: int = -1) -> dict[str, str]:
    """Role by path inside one block, norms left out."""
    path = anatomy.blocks[block].path
    return {
        s.path[len(path) + 1 :]: s.role for s in anatomy.sites if s.block == path and s.role not in ("block", "norm")
    }


def transformer(model: str, config: str, **options: Any) -> nn.Module:
    return getattr(hf, model)(getattr(hf, config)(**options)).eval()


@pytest.mark.parametrize("head", ["Model", "ForImageClassification"])
@pytest.mark.parametrize("family", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_every_layer_of_a_vision_transformer_of_transformers_has_its_role(family: str, head: str) -> None:
    found = tg.anatomy(transformer(family + head, f"{family}Config", **VISION))
    assert Counter(roles(found).values()) == Counter({**SEPARATE, "mlp": 1})
    assert len(found.blocks) == 2
    assert (found.head is None) == (head == "Model")


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_the_many_layers_called_dense_in_bert_have_different_roles(head: str) -> None:
    options = VISION | {"vocab_size": 50}
    found = tg.anatomy(transformer("Bert" + head, "BertConfig", **options))
    assert roles(found) == {
        "attention": "attn",
        "attention.self.query": "attn.q",
        "attention.self.key": "attn.k",
        "attention.self.value": "attn.v",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    assert found.head == (None if head == "Model" else "classifier")


def test_an_intermediate_layer_as_wide_as_the_block_is_still_fc1() -> None:
    options = VISION | {"vocab_size": 50, "intermediate_size": 32}
    found = roles(tg.anatomy(transformer("BertModel", "BertConfig", **options)))
    assert (found["intermediate.dense"], found["output.dense"]) == ("mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(("gate", "first"), [("relu", {"wi"}), ("gated-gelu", {"wi_0", "wi_1"})])
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_t5_has_two_attentions_in_the_decoder_and_its_own_names(head: str, gate: str, first: set[str]) -> None:
    found = tg.anatomy(transformer("T5" + head, "T5Config", **T5, feed_forward_proj=gate))
    encoder, decoder = roles(found, 0), roles(found, -1)
    assert [p for p, r in encoder.items() if r == "attn"] == ["layer.0.SelfAttention"]
    assert [p for p, r in decoder.items() if r == "attn"] == ["layer.0.SelfAttention", "layer.1.EncDecAttention"]
    assert decoder["layer.1.EncDecAttention.o"] == "attn.proj"
    assert {p.rpartition(".")[2] for p, r in encoder.items() if r == "mlp.fc1"} == first
    assert encoder["layer.1.DenseReluDense.wo"] == "mlp.fc2"
    assert [len(s.blocks) for s in found.stages] == [2, 2]


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_bart_has_its_mlp_layers_directly_in_the_block(head: str) -> None:
    found = tg.anatomy(transformer("Bart" + head, "BartConfig", **BART))
    assert Counter(roles(found, 0).values()) == Counter(SEPARATE)
    assert roles(found)["encoder_attn.out_proj"] == "attn.proj"
    assert (found.head is None) == (head == "Model")


@pytest.mark.parametrize("head", ["Model", "ForImageClassification"])
def test_swin_and_the_convnets_of_transformers_have_their_roles(head: str) -> None:
    swin = transformer("Swin" + head, "SwinConfig", image_size=64, patch_size=4, embed_dim=16, depths=[1, 1],
                       num_heads=[2, 4], window_size=4)  # fmt: skip
    assert Counter(roles(tg.anatomy(swin)).values()) == Counter({**SEPARATE, "mlp": 1})
    sizes: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    convnext = tg.anatomy(transformer("ConvNext" + head, "ConvNextConfig", **sizes, image_size=64))
    assert list(roles(convnext).values()) == ["spatial_conv", "mlp.fc1", "mlp.fc2"]
    assert len(convnext.find("downsample")) == 3
    resnet = tg.anatomy(transformer("ResNet" + head, "ResNetConfig", **sizes, embedding_size=8))
    assert list(roles(resnet).values()) == ["conv", "conv", "spatial_conv", "conv"]
    assert (resnet.head is None) == (head == "Model")


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "samvit_base_patch16_224", "beit_base_patch16_224"]
)
def test_every_layer_of_a_timm_transformer_has_its_role(name: str) -> None:
    found = on_meta(name)
    block = found.blocks[0].path
    assert Counter(s.role for s in found.sites if s.block == block and s.path != block) == Counter(FUSED)


def test_gated_mlps_have_two_first_layers() -> None:
    assert Counter(roles(on_meta("eva02_base_patch14_224", depth=1)).values())["mlp.fc1"] == 2
    packed = roles(on_meta("vit_giant_patch14_dinov2", depth=1))
    assert (packed["mlp.fc1"], packed["mlp.fc2"]) == ("mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(
    ("name", "wanted"),
    {
        "resnet18": {"conv1": "spatial_conv", "conv2": "conv"},
        "resnet50": {"conv1": "conv", "conv2": "spatial_conv", "conv3": "conv"},
        "resnetv2_18": {"conv1": "spatial_conv", "conv2": "conv"},
        "regnety_004": {"conv2.conv": "spatial_conv", "se.fc1": "conv", "conv1.conv": "conv"},
        "ecaresnet26t": {"conv2": "spatial_conv", "se.conv": "conv"},
        "densenet121": {"conv1": "conv", "conv2": "spatial_conv"},
        "resnest14d": {"conv2.conv": "spatial_conv", "conv2.fc1": "conv"},
        "skresnet18": {
            "conv1.paths.0.conv": "spatial_conv",
            "conv1.paths.1.conv": "spatial_conv",
            "conv1.attn.fc_reduce": "conv",
            "conv2.conv": "conv",
        },
        "convnext_atto": {"conv_dw": "spatial_conv", "mlp": "mlp", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
        "nextvit_small": {"mhca.group_conv3x3": "spatial_conv", "mhca.projection": "conv"},
        "pvt_v2_b0": {
            "attn": "attn",
            "attn.q": "attn.q",
            "attn.kv": "attn.kv",
            "attn.sr": "conv",
            "mlp.dwconv": "conv",
        },
        "levit_128s": {"attn.qkv.linear": "attn.qkv", "attn.proj.ln.linear": "attn.proj"},
        "mixer_s32_224": {"mlp_tokens.fc1": "linear", "mlp_channels.fc1": "mlp.fc1", "mlp_channels": "mlp"},
        "mvitv2_tiny": {"attn.qkv": "attn.qkv", "attn.pool_q": "conv"},
        "cait_xxs24_224": {"attn.proj": "attn.proj", "attn.proj_l": "linear"},
        "test_vit_relpos": {"attn.rel_pos.mlp.fc1": "linear", "mlp.fc1": "mlp.fc1"},
    }.items(),
)
def test_layers_of_a_block_have_the_role_of_what_they_do(name: str, wanted: dict[str, str]) -> None:
    found = roles(on_meta(name), 0)
    assert {path: found.get(path) for path in wanted} == wanted


def test_a_gate_that_is_called_attention_is_none() -> None:
    for name in ("test_byobnet", "ese_vovnet19b_slim_dw", "hgnetv2_b0", "cs3sedarknet_l"):
        assert on_meta(name).find("attn") == [], name


def test_multi_head_attention_of_pytorch_is_an_attention_whose_projection_never_runs() -> None:
    found = tg.anatomy(nn.Sequential(nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
    assert roles(found) == {
        "self_attn": "attn",
        "self_attn.out_proj": "attn.proj",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
    }
    assert found.site("1.self_attn.out_proj").fires is False
