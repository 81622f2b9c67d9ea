"""RSSeg's head on maps of ViTs and of pyramids."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.backbones import create_features
from torchgraft.errors import GraftError
from torchgraft.tasks.dense import (
    DiscriminativeCrossAttention,
    RSSegHead,
    SpatiallyAdaptiveSeparation,
    TwoPathway,
    region_loss,
    rsseg_loss,
)
from torchgraft.tasks.dense.separation import local_discrepancy


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def maps(width: int = 32, size: tuple[int, int] = (6, 5), taps: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, width, *size, generator=generator) for _ in range(taps + 1)]


def labels(classes: int = 5, size: tuple[int, int] = (24, 20)) -> Tensor:
    return torch.randint(classes, (2, *size), generator=torch.Generator().manual_seed(1))


def small_head(width: int = 32, **options) -> RSSegHead:
    return RSSegHead([width] * 5, num_classes=5, dim=16, heads=4, **options)


def test_a_constant_map_has_no_local_discrepancy_not_even_at_the_border() -> None:
    assert local_discrepancy(torch.full((1, 2, 5, 4), 3.0)).abs().max() < 1e-6


def test_the_pathway_starts_as_the_norm_of_what_the_first_block_reads() -> None:
    head, given = small_head(), maps()
    assert torch.equal(head.path(given).local, head.path.stem_norm(head.path.stem(given[0])))


@pytest.mark.parametrize(("size", "kernel"), [((4, 5), 3), ((1, 1), 3), ((6, 3), 5)])
def test_every_position_moves_away_from_the_weighted_mean_of_neighbours_inside_the_map(
    size: tuple[int, int], kernel: int
) -> None:
    torch.manual_seed(0)
    separation = SpatiallyAdaptiveSeparation(8, 4, kernel)
    x = torch.randn(1, 8, *size)
    found = separation(x)
    query, key = separation.theta(x), separation.phi(x)
    for row in range(size[0]):
        for column in range(size[1]):
            reach = kernel // 2
            window = (slice(max(0, row - reach), row + reach + 1), slice(max(0, column - reach), column + reach + 1))
            scores = (query[0, :, row, column, None, None] * key[0][:, *window]).sum(0) / 2
            mean = (x[0][:, *window] * scores.flatten().softmax(0).view_as(scores)).sum((1, 2))
            assert torch.allclose(found.local_mean[0, :, row, column], mean, atol=1e-5)
    strength = F.softplus(torch.tensor(-2.0))
    assert torch.allclose(found.output, x + strength * found.gate * (x - found.local_mean), atol=1e-6)


def test_a_signed_separation_starts_as_the_identity() -> None:
    x = torch.randn(1, 8, 4, 5)
    assert torch.equal(SpatiallyAdaptiveSeparation(8, 4, signed=True)(x).output, x)


def test_parameters_follow_the_formulas() -> None:
    big, d, e, n, k, layers = 32, 16, 4, 4, 5, 2
    path = d * (big + 1) + 2 * d + n * (d * (big + 1) + 4 * d * d + 15 * d) + 2 * big + d * (big + 1) + 2 * d * d + d
    sasm = 2 * (d * e + e) + 9 * d + 1 + d
    dca = k * d + layers * (12 * d * d + 15 * d) + d * k + k + d * d + d + 2 * d
    assert count(TwoPathway([big] * (n + 1), d)) == path
    assert count(SpatiallyAdaptiveSeparation(d, e)) == sasm
    assert count(DiscriminativeCrossAttention(d, k, layers, 4)) == dca
    assert count(small_head()) == path + sasm + dca + d * k + k


def test_the_width_is_256_for_a_vit_and_128_for_a_pyramid() -> None:
    assert RSSegHead([32] * 3, num_classes=2, layers=1).pixel.in_channels == 256
    assert RSSegHead([16, 16, 32], num_classes=2, layers=1).pixel.in_channels == 128


@pytest.mark.parametrize("size", [(224, 224), (160, 96)])
def test_the_head_reads_a_vit_at_any_size(size: tuple[int, int]) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=4, num_heads=2, dynamic_img_size=True)
    image = torch.randn(2, 3, *size)
    grid = size[0] // 16, size[1] // 16
    with torch.no_grad():
        first = vit._pos_embed(vit.patch_embed(image))[:, 1:].transpose(1, 2).unflatten(2, grid)
        taps = vit.forward_intermediates(image, indices=4, intermediates_only=True)
    found = small_head()([first, *taps])
    assert found.logits.shape == (2, 5, *grid)
    rsseg_loss(found, labels(size=size)).loss.backward()


@pytest.mark.parametrize("name", ["convnext_atto", "efficientnet_lite0"])
def test_on_a_pyramid_the_maps_have_the_size_of_the_finest(name: str) -> None:
    provider = create_features(name, pretrained=False).requires_grad_(False)
    found = provider(torch.randn(1, 3, 64, 96))
    before = {key: value.clone() for key, value in provider.state_dict().items()}
    head = RSSegHead([provider.channels[0], *provider.channels], num_classes=5, dim=16, heads=4)
    output = head([found[0], *found])
    assert output.logits.shape == (1, 5, 16, 24)
    rsseg_loss(output, labels(size=(64, 96))[:1]).loss.backward()
    assert [key for key, parameter in head.named_parameters() if parameter.grad is None] == []
    assert all(torch.equal(value, before[key]) for key, value in provider.state_dict().items())


def test_no_gradient_goes_into_the_backbone_unless_asked_for() -> None:
    for detach in (True, False):
        given = [each.requires_grad_() for each in maps()]
        rsseg_loss(small_head(detach=detach)(given), labels()).loss.backward()
        assert [each.grad is None for each in given] == [detach] * 5


def test_the_loss_weighs_its_parts() -> None:
    found = rsseg_loss(small_head()(maps()), labels())
    assert torch.allclose(found.loss, found.mask + 0.4 * found.attention + 0.4 * found.region)
    assert found.tap == 0


def test_a_classifier_on_the_last_tap_trains_the_tap_it_reads() -> None:
    head, given = small_head(detach=False, tap_classifier=True), maps()
    output = head(given)
    found = rsseg_loss(output, labels())
    assert output.tap_logits is not None and output.tap_logits.shape == (2, 5, 6, 5)
    assert found.tap > 0
    assert torch.allclose(found.loss, found.mask + 0.4 * (found.attention + found.region + found.tap))


def test_a_class_that_an_image_lacks_gets_no_gradient_from_its_region() -> None:
    logits = torch.randn(2, 3, 3, requires_grad=True)
    given = torch.tensor([[[0, 2], [255, 0]], [[1, 1], [1, 1]]])
    loss = region_loss(logits, given)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.any(-1).tolist() == [[True, False, True], [False, True, False]]
    rows, target = logits.detach()[[0, 0, 1], [0, 2, 1]], torch.tensor([0, 2, 1])
    assert torch.allclose(loss.detach(), F.cross_entropy(rows, target))


def test_labels_without_a_valid_pixel_give_a_loss_of_zero() -> None:
    found = rsseg_loss(small_head()(maps()), torch.full((2, 24, 20), 255))
    found.loss.backward()
    assert found.loss == 0


def test_the_head_works_in_the_type_it_is_made_in() -> None:
    head = small_head(dtype=torch.float64)
    assert head([each.double() for each in maps()]).logits.dtype == torch.float64


def test_the_head_runs_under_autocast() -> None:
    head = small_head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(maps())
        loss = rsseg_loss(found, labels()).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert torch.allclose(found.logits.float(), head(maps()).logits, atol=0.05)


def test_what_does_not_fit_the_head_is_named() -> None:
    head = small_head()
    with pytest.raises(GraftError, match="G_0 and then the taps"):
        head(maps(taps=3))
    coarse = maps()
    coarse[1] = coarse[1][..., :3, :3]
    with pytest.raises(GraftError, match="from high to low resolution"):
        head(coarse)
    with pytest.raises(GraftError, match="heads=5 do not divide dim=16"):
        RSSegHead([32] * 5, num_classes=5, dim=16, heads=5)
    with pytest.raises(GraftError, match="at least one tap"):
        RSSegHead([32], num_classes=5)
    with pytest.raises(GraftError, match="kernel=2"):
        small_head(kernel=2)
    with pytest.raises(GraftError, match="layers=0"):
        small_head(layers=0)


def test_the_head_makes_every_tensor_on_the_device_of_its_input() -> None:
    found = small_head(device="meta")([each.to("meta") for each in maps()])
    assert found.logits.is_meta and rsseg_loss(found, labels().to("meta")).loss.is_meta
