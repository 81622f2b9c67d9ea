from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.byobnet import checkpoint_filter_fn

from torchgraft.errors import GraftError
from torchgraft.tasks.denseclip import ClipViT, TextEncoder, create_trunk, load_clip_text, load_clip_visual, trunk_name


def test_text_weights_of_transformers_give_its_embeddings() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        projection_dim=24,
        bos_token_id=58,
        eos_token_id=59,
    )
    theirs = transformers.CLIPTextModelWithProjection(config).eval()
    ours = TextEncoder(context_length=9, vocab_size=60, width=32, heads=4, layers=2, embed_dim=24)
    load_clip_text(ours, theirs.state_dict())
    ids = torch.tensor([[58, 3, 9, 7, 5, 59, 0, 0, 0]])
    # The words between start and name stand where contexts would.
    contexts = ours.token_embedding(ids[:, 1:4])
    tokens = torch.cat([ids[:, :1], ids[:, 4:]], dim=1)
    wanted = theirs(input_ids=ids).text_embeds
    torch.testing.assert_close(ours(tokens, contexts)[0], wanted, rtol=1e-5, atol=1e-6)


def test_openai_text_weights_are_cut_to_the_positions_in_use(text_encoder: TextEncoder) -> None:
    longer = TextEncoder(context_length=20, vocab_size=60, width=32, heads=4, layers=2, embed_dim=24)
    state = {**longer.state_dict(), "visual.conv1.weight": torch.zeros(1), "logit_scale": torch.zeros(())}
    load_clip_text(text_encoder, state)
    assert torch.equal(text_encoder.positional_embedding, longer.positional_embedding[:9])
    assert torch.equal(text_encoder.text_projection, longer.text_projection)


def test_missing_and_misshapen_text_weights_are_named(text_encoder: TextEncoder) -> None:
    state = text_encoder.state_dict()
    with pytest.raises(GraftError, match=r"lacks ln_final\.bias"):
        load_clip_text(text_encoder, {k: v for k, v in state.items() if k != "ln_final.bias"})
    with pytest.raises(GraftError, match="another shape of text_projection"):
        load_clip_text(text_encoder, {**state, "text_projection": torch.zeros(32, 8)})


def test_the_image_tower_gets_the_names_that_timm_gives_it() -> None:
    small = {"stem_chs": (4, 4, 8)}
    with torch.device("meta"):
        model = timm.create_model("resnet50_clip", pretrained=False, **small)
        trunk = create_trunk("resnet50_clip", 24, input_size=64, pretrained=False, **small)
    official = ["conv1.weight", "bn3.running_var", "layer1.0.conv1.weight", "layer1.0.bn2.bias", "layer4.2.bn3.weight"]
    official += ["layer2.0.downsample.0.weight", "layer3.0.downsample.1.running_mean", "layer3.5.conv2.weight"]
    timms = checkpoint_filter_fn({f"visual.{key}": torch.zeros(1) for key in official}, model)
    ours = [trunk_name(key, trunk) for key in official]
    assert ours == [f"provider.backbone.model.{key}" for key in timms]
    assert set(ours) <= trunk.state_dict().keys()


def test_the_vision_tower_is_loaded_with_its_positions_resized(vit: Callable[..., ClipViT]) -> None:
    source, target = vit(input_resolution=48), vit()
    state = {f"visual.{k}": v for k, v in source.state_dict().items() if not k.startswith("fpn")}
    load_clip_visual(target, {**state, "ln_final.weight": torch.zeros(1)})
    assert torch.equal(target.proj, source.proj)
    assert target.positional_embedding.shape == (17, 16)
    assert torch.equal(target.positional_embedding[0], source.positional_embedding[0])
    image = torch.randn(1, 3, 48, 48)
    assert torch.equal(target.conv1(image), source.conv1(image))


def test_an_unknown_tensor_of_the_image_tower_is_named(vit: Callable[..., ClipViT]) -> None:
    trunk = vit()
    state = {f"visual.{k}": v for k, v in trunk.state_dict().items()}
    with pytest.raises(GraftError, match="unknown attnpool"):
        load_clip_visual(trunk, {**state, "visual.attnpool.c_proj.bias": torch.zeros(1)})
