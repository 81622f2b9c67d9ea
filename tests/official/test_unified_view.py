"""The unified view's official code: whole checkpoints of its hosts, and what its options mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.official.unified_view import Tuning

IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 11, 2, 1]])
SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def bart() -> nn.Module:
    torch.manual_seed(0)
    return hf.BartModel(hf.BartConfig(**SMALL)).eval()


def official(prefix: str = "") -> dict[str, Tensor]:
    """What the official code saves of a MAM on this BART: three nets and an adapter per layer."""
    torch.manual_seed(1)
    state: dict[str, Tensor] = {}
    for kind, layers in (("_enc", 2), ("", 1), ("2", 1)):
        state[f"prompt_model.wte{kind}.weight"] = torch.randn(3, 8)
        for i, (out, inn) in (("0", (4, 8)), ("2", (2 * 8 * layers, 4))):
            state[f"prompt_model.control_trans{kind}.{i}.weight"] = torch.randn(out, inn)
            state[f"prompt_model.control_trans{kind}.{i}.bias"] = torch.randn(out)
    for block in ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0"):
        for name, (out, inn) in (("down_proj", (5, 8)), ("up_proj", (8, 5))):
            state[f"{prefix}{block}.ef_ffn_adapter.{name}.weight"] = torch.randn(out, inn)
            state[f"{prefix}{block}.ef_ffn_adapter.{name}.bias"] = torch.randn(out)
    return state


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def test_a_checkpoint_of_mam_is_read_with_a_net_for_every_kind_of_attention() -> None:
    model, state = bart(), official()
    plain = run(model)
    options = {"attn_option": "concat", "ffn_option": "parallel", "ffn_scale": 4.0}
    adapter = tg.load_official(model, state, system="unified_view", **options)
    assert str(adapter.method) == "mam[length=3, width=5, scale=4.0, reparametrise=true, mid=4]"
    assert sum(t.numel() for t in state.values()) == adapter.num_parameters()
    assert not torch.allclose(run(model), plain, rtol=1e-2, atol=1e-2)
    # Key and value of the encoder's second layer are the last two quarters of what its net returns.
    hidden = (state["prompt_model.wte_enc.weight"] @ state["prompt_model.control_trans_enc.0.weight"].T
              + state["prompt_model.control_trans_enc.0.bias"]).tanh()  # fmt: skip
    whole = hidden @ state["prompt_model.control_trans_enc.2.weight"].T + state["prompt_model.control_trans_enc.2.bias"]
    second = next(p for _, p in adapter.placements if p.home == "encoder.layers.1.self_attn")
    for found, wanted in zip(second.form(), whole.view(3, 4, 8).unbind(1)[2:], strict=True):
        torch.testing.assert_close(found, wanted)
    out = run(model)
    tg.methods.prefix.finalise(adapter)
    torch.testing.assert_close(run(model), out, rtol=1e-4, atol=1e-5)


def test_the_wrapper_of_the_official_model_is_taken_off_its_keys() -> None:
    options = {"attn_option": "concat", "ffn_option": "parallel", "ffn_scale": 4.0}
    plain, wrapped = bart(), bart()
    tg.load_official(plain, official(), system="unified_view", **options)
    tg.load_official(wrapped, official("seq2seq_model."), system="unified_view", **options)
    assert torch.equal(run(plain), run(wrapped))


def test_an_unknown_key_is_refused_and_leaves_the_model_plain() -> None:
    model = bart()
    with pytest.raises(tg.GraftError, match=r"unknown key 'encoder.layers.0.other.weight'"):
        tg.load_official(
            model,
            {**official(), "encoder.layers.0.other.weight": torch.zeros(1)},
            system="unified_view",
            attn_option="concat",
            ffn_option="parallel",
        )
    assert tg.core.adapters(model) == {}


METHODS = {
    "prefix[length=5, reparametrise=true, mid=20]": {"attn_mode": "prefix", "attn_option": "concat"},
    "prefix[length=5, gated=false, reparametrise=true, mid=20]": {
        "attn_mode": "prefix",
        "attn_option": "cross_attn_noln",
        "attn_composition": "add",
    },
    "prefix[length=5]": {"attn_mode": "prefix_nomlp", "attn_option": "concat"},
    "multihead-adapter[length=5, init=official]": {
        "attn_mode": "prefix_nomlp",
        "attn_option": "cross_attn_relu",
        "attn_composition": "add",
    },
    "lora[rank=5, alpha=8.0, targets=[q, v]] + lora[rank=6, alpha=8.0, targets=[fc1, fc2]]": {
        "attn_mode": "lora",
        "ffn_mode": "lora",
    },
    "pfeiffer[width=6, reads=sum, init=bert]": {"ffn_mode": "adapter", "ffn_option": "pfeiffer"},
}


@pytest.mark.parametrize("method", METHODS)
def test_official_options_name_methods_of_ours(method: str) -> None:
    sizes = {"attn_bottleneck": 5, "ffn_bottleneck": 6, "lora_alpha": 8.0, "mid_dim": 20}
    assert Tuning(**METHODS[method], **sizes).method() == tg.method(method)


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"attn_mode": "prefix", "attn_option": "cross_attn"},
        {"attn_mode": "mh_adaptor"},
        {"ffn_mode": "adapter", "ffn_option": "sequential", "ffn_scale": 4.0},
    ],
)
def test_options_that_are_no_combination_are_refused(told: dict[str, Any]) -> None:
    with pytest.raises(tg.GraftError, match=r"^unified_view: "):
        Tuning(**told).method()
