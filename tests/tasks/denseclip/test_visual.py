from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from torchgraft.errors import GraftError
from torchgraft.tasks.denseclip import ClipViT, create_trunk


def test_the_clip_resnet_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        trunk = create_trunk("resnet50_clip", 1024, pretrained=False)
    assert sum(p.numel() for p in trunk.pool.parameters()) == 15_213_568
    assert sum(p.numel() for p in trunk.parameters()) == 38_740_832
    assert trunk.pool.num_heads == 32


@pytest.mark.parametrize("name", ["convnext_atto", "efficientnet_lite0"])
@pytest.mark.parametrize("projector", ["attnpool", "conv1x1"])
def test_any_backbone_embeds_images_of_any_size(name: str, projector: str) -> None:
    trunk = create_trunk(name, 24, input_size=64, projector=projector, pretrained=False)  # type: ignore[arg-type]
    found = trunk(torch.randn(1, 3, 70, 101))
    assert [m.shape[1] for m in found.maps] == list(trunk.channels)
    assert found.pooled.shape == (1, 24)
    assert found.dense.shape == (1, 24, *found.maps[trunk.dense_index].shape[2:])


def test_an_unknown_projector_is_refused() -> None:
    with pytest.raises(GraftError, match="projector='linear'"):
        create_trunk("convnext_atto", 24, projector="linear", pretrained=False)  # type: ignore[arg-type]


def test_the_vision_transformer_gives_four_scales_at_sizes_it_was_not_made_for(vit: Callable[..., ClipViT]) -> None:
    trunk = vit()
    found = trunk(torch.randn(1, 3, 96, 64))
    assert [tuple(m.shape[2:]) for m in found.maps] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert trunk.strides == (4, 8, 16, 32)
    assert found.dense.shape == (1, 24, 6, 4)


def test_the_second_class_embedding_is_off_unless_asked_for(vit: Callable[..., ClipViT]) -> None:
    ours, published = vit(), vit(double_cls=True)
    published.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(ours(image).pooled, published(image).pooled)
    with torch.no_grad():
        ours.class_embedding.mul_(2)
    torch.testing.assert_close(ours(image).pooled, published(image).pooled)


def test_taps_that_are_no_four_rising_blocks_are_refused(vit: Callable[..., ClipViT]) -> None:
    with pytest.raises(GraftError, match="expected four rising blocks between 0 and 3"):
        vit(out_indices=(0, 1, 2, 4))
