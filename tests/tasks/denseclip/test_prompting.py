from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchgraft.errors import GraftError
from torchgraft.tasks.denseclip import ClipViT, LanguageGuided, TextEncoder, score_map


@pytest.fixture
def build(
    vit: Callable[..., ClipViT], text_encoder: TextEncoder, class_tokens: Tensor, decoder: dict[str, int]
) -> Callable[..., LanguageGuided]:
    def make(**options: Any) -> LanguageGuided:
        return LanguageGuided(vit(), text_encoder, class_tokens, decoder=decoder, **options).eval()

    return make


IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)


def test_scores_are_cosines(build: Callable[..., LanguageGuided]) -> None:
    scores = build().guide(IMAGE).scores
    assert scores.shape == (2, 4, 4, 4)
    assert float(scores.detach().abs().max()) <= 1 + 1e-6
    same = torch.randn(1, 3, 1, 2)
    torch.testing.assert_close(score_map(same, 5 * same[..., 0].mT)[0, 0, 0, 0], torch.tensor(1.0))


def test_gamma_zero_leaves_the_class_embeddings_exactly(build: Callable[..., LanguageGuided]) -> None:
    model = build()
    with torch.no_grad():
        model.gamma.zero_()  # type: ignore[union-attr]
    plain = model.text_encoder(model.class_tokens, model.contexts)
    assert torch.equal(model.guide(IMAGE).text, plain.expand(2, -1, -1))


def test_only_the_map_of_the_scores_grows_by_one_channel_a_class(build: Callable[..., LanguageGuided]) -> None:
    model = build()
    guided = model.guide(IMAGE)
    assert tuple(m.shape[1] for m in guided.maps) == model.in_channels == (16, 16, 20, 16)
    assert torch.equal(guided.maps[2][:, 16:], guided.scores)
    scaled = build(concat_scaled=True, tau=0.5)
    guided = scaled.guide(IMAGE)
    torch.testing.assert_close(guided.maps[2][:, 16:], guided.scores / 0.5)


def test_a_step_trains_the_contexts_and_leaves_the_text_encoder(build: Callable[..., LanguageGuided]) -> None:
    model = build().train()
    before = {k: v.clone() for k, v in model.text_encoder.state_dict().items()}
    contexts = model.contexts.detach().clone()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    model.guide(IMAGE).scores.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.contexts, contexts)
    assert all(torch.equal(value, before[key]) for key, value in model.text_encoder.state_dict().items())


@pytest.mark.parametrize("prompting", ["post", "pre"])
def test_every_parameter_of_prompting_gets_a_gradient(build: Callable[..., LanguageGuided], prompting: str) -> None:
    model = build(prompting=prompting)
    guided = model.guide(IMAGE)
    weights = torch.randn_like(guided.scores)
    (guided.scores * weights).sum().backward()
    prompts = [(n, p) for n, p in model.named_parameters() if n.startswith(("context", "gamma"))]
    assert len(prompts) > 20
    assert all(p.grad is not None and p.grad.any() for _, p in prompts)


def test_pre_model_prompting_gives_each_image_its_own_contexts(build: Callable[..., LanguageGuided]) -> None:
    model = build(prompting="pre")
    text = model.guide(IMAGE).text
    assert text.shape == (2, 4, 24)
    assert model.gamma is None
    assert not torch.allclose(text[0], text[1])
    torch.testing.assert_close(model.guide(IMAGE[1:]).text[0], text[1])


def test_cached_class_embeddings_change_nothing_and_are_dropped_when_old(build: Callable[..., LanguageGuided]) -> None:
    model = build()
    uncached = model.guide(IMAGE).scores
    model.cache_text()
    torch.testing.assert_close(model.guide(IMAGE).scores, uncached, rtol=0, atol=1e-6)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["contexts"] = -state["contexts"]
    model.load_state_dict(state)
    assert not torch.allclose(model.guide(IMAGE).text, uncached.new_zeros(())) and model._cached is None
    model.cache_text()
    assert model.train().eval()._cached is None


def test_cached_evaluation_does_not_call_the_text_encoder(build: Callable[..., LanguageGuided]) -> None:
    model = build()
    model.cache_text()
    model.text_encoder.forward = None  # type: ignore[assignment]
    assert model.guide(IMAGE).scores.isfinite().all()


def test_pre_model_prompting_has_nothing_to_cache(build: Callable[..., LanguageGuided]) -> None:
    with pytest.raises(GraftError, match="depend on the image"):
        build(prompting="pre").cache_text()


def test_contexts_start_as_wide_as_published(build: Callable[..., LanguageGuided]) -> None:
    model = build()
    assert model.contexts.shape == (1, 4, 32)
    assert 0.7 < float(model.contexts.detach().std()) < 1.0  # a unit normal cut at 2 has 0.88
    assert float(model.contexts.detach().abs().max()) <= 2
    assert torch.equal(model.gamma, torch.full((24,), 1e-4))  # type: ignore[arg-type]


def test_sides_that_do_not_fit_are_refused(
    vit: Callable[..., ClipViT], text_encoder: TextEncoder, class_tokens: Tensor
) -> None:
    with pytest.raises(GraftError, match="embeddings have 8 channels, the text encoder's 24"):
        LanguageGuided(vit(output_dim=8), text_encoder, class_tokens)
    with pytest.raises(GraftError, match="class names of 9 tokens leave no context"):
        LanguageGuided(vit(), text_encoder, class_tokens.repeat(1, 2)[:, :9])
    with pytest.raises(GraftError, match="prompting='both'"):
        LanguageGuided(vit(), text_encoder, class_tokens, prompting="both")  # type: ignore[arg-type]
