from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.errors import GraftError
from torchgraft.tasks.dense import pixel_cross_entropy
from torchgraft.tasks.denseclip import ClipViT, DenseClipSegmentor, TextEncoder, create_trunk
from torchgraft.tasks.heads import SemanticFPN


class Linear(nn.Module):
    """One 1x1 convolution on the map at stride 16."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.index = list(strides).index(16)
        self.conv = nn.Conv2d(channels[self.index], num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.conv(maps[self.index])


@pytest.fixture
def build(
    vit: Callable[..., ClipViT], text_encoder: TextEncoder, class_tokens: Tensor, decoder: dict[str, int]
) -> Callable[..., DenseClipSegmentor]:
    def make(**options: Any) -> DenseClipSegmentor:
        return DenseClipSegmentor(vit(), text_encoder, class_tokens, decoder=decoder, make_head=Linear, **options)

    return make


def test_logits_come_back_at_the_size_of_the_images(build: Callable[..., DenseClipSegmentor]) -> None:
    assert build()(torch.randn(2, 3, 64, 96)).shape == (2, 4, 64, 96)


def test_losses_are_the_head_s_and_the_scaled_scores_with_its_weight(
    build: Callable[..., DenseClipSegmentor],
) -> None:
    model, labels = build(tau=0.1, score_loss_weight=0.3), torch.randint(0, 4, (2, 64, 64))
    logits, guided = model.segment(torch.randn(2, 3, 64, 64))
    losses = model.losses(logits, guided.scores, labels)
    torch.testing.assert_close(losses["loss_segmentation"], pixel_cross_entropy(logits, labels))
    torch.testing.assert_close(losses["loss_score"], 0.3 * pixel_cross_entropy(guided.scores / 0.1, labels))


def test_ignored_pixels_count_in_the_published_average_only(build: Callable[..., DenseClipSegmentor]) -> None:
    logits, scores, labels = torch.randn(1, 4, 4, 4), torch.rand(1, 4, 4, 4), torch.zeros(1, 8, 8).long()
    labels[:, :2] = 255
    ours = build().losses(logits, scores, labels)
    published = build(denominator="all_pixels").losses(logits, scores, labels)
    for name, loss in ours.items():
        torch.testing.assert_close(published[name], 0.75 * loss)


@pytest.mark.parametrize("denominator", ["valid", "all_pixels"])
def test_a_batch_without_labels_has_finite_losses_and_gradients(
    build: Callable[..., DenseClipSegmentor], denominator: str
) -> None:
    model = build(denominator=denominator)
    logits, guided = model.segment(torch.randn(1, 3, 64, 64))
    losses = model.losses(logits, guided.scores, torch.full((1, 64, 64), 255))
    torch.stack(list(losses.values())).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", ["convnext_atto", "efficientnet_lite0"])
def test_any_backbone_carries_the_scores_on_its_last_map(
    name: str, text_encoder: TextEncoder, class_tokens: Tensor, decoder: dict[str, int]
) -> None:
    trunk = create_trunk(name, 24, input_size=64, pretrained=False)
    model = DenseClipSegmentor(trunk, text_encoder, class_tokens, decoder=decoder, make_head=Linear).eval()
    logits, guided = model.segment(torch.randn(1, 3, 70, 101))
    assert guided.maps[-1].shape[1] == trunk.channels[-1] + 4
    assert logits.isfinite().all()


def test_an_unknown_denominator_is_refused(build: Callable[..., DenseClipSegmentor]) -> None:
    with pytest.raises(GraftError, match="denominator='mean'"):
        build(denominator="mean")


@pytest.mark.parametrize(
    ("name", "embed_dim", "parameters"),
    [("resnet50_clip", 1024, 50_248_438), ("resnet101_clip", 512, 67_795_190), ("vit", 512, 105_273_494)],
)
def test_published_segmentors_have_their_parameter_counts(name: str, embed_dim: int, parameters: int) -> None:
    with torch.device("meta"):
        trunk = ClipViT() if name == "vit" else create_trunk(name, embed_dim, pretrained=False)
        model = DenseClipSegmentor(trunk, TextEncoder(embed_dim=embed_dim), torch.zeros(150, 5).long())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_a_lateral_that_reads_no_scores_gives_the_plain_model_s_logits(
    vit: Callable[..., ClipViT], text_encoder: TextEncoder, class_tokens: Tensor, decoder: dict[str, int]
) -> None:
    model = DenseClipSegmentor(
        vit(), text_encoder, class_tokens, decoder=decoder, make_head=partial(SemanticFPN, fpn_width=8, width=8)
    ).eval()
    plain = SemanticFPN(model.backbone.channels, model.backbone.strides, 4, fpn_width=8, width=8).eval()
    state = model.decode_head.state_dict()
    name = "neck.lateral_convs.2.conv.weight"
    state[name][:, 16:] = 0
    plain.load_state_dict({**state, name: state[name][:, :16]})
    image = torch.randn(2, 3, 64, 64)
    logits, guided = model.segment(image)
    torch.testing.assert_close(logits, plain(guided.visual.maps), rtol=1e-6, atol=1e-7)
