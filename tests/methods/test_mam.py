"""MAM: the counts of the paper, and that it is a prefix and a scaled parallel adapter."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import torchgraft as tg

from .networks import count, images, tiny
from .test_prefix import bart_large, values


def test_counts_are_those_of_the_specification() -> None:
    assert count("vit_base_patch16_224", "mam") == 599_232
    biases = 24 * (512 + 1024)
    assert values("mam[length=30, width=512, scale=4.0]", bart_large()) - biases == 27_377_664


def test_roberta_base_has_the_half_per_cent_of_the_paper() -> None:
    with torch.device("meta"):
        config = hf.RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1)
        model = hf.RobertaModel(config, add_pooling_layer=False)
        where = tg.anatomy(model)
    assert values("mam", where) == 599_232
    assert values("mam", where) - 12 * (16 + 768) == 589_824
    assert 589_824 / sum(p.numel() for p in model.parameters()) == pytest.approx(0.00476, abs=1e-4)


def test_it_is_a_prefix_and_a_scaled_parallel_adapter() -> None:
    model = tiny("test_vit")
    mam = tg.attach(model, "mam[length=4, width=3, scale=4.0]", name="mam")
    both = tg.attach(model, "prefix[length=4] + scaled-parallel-adapter[width=3]", name="both")
    assert list(mam.state_dict()) == list(both.state_dict())
    with torch.no_grad():
        for parameter in mam.parameters():
            parameter.normal_(std=0.1)
    both.load_state_dict(mam.state_dict())
    outs = []
    for name in ("mam", "both"):
        tg.activate(model, name)
        outs.append(model(images()))
    torch.testing.assert_close(*outs)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(tg.GraftError, match=r"^mam: no attention of ConvNeXt is selected"):
        tg.attach(tiny("test_convnext"), "mam")


@pytest.mark.parametrize("field", ["length", "width", "mid"])
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(tg.GraftError, match=rf"^mam: {field}=0 is not valid"):
        tg.method(f"mam[{field}=0]")
