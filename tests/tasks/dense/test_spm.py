"""Prompt matchers between the stages of frozen backbones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.errors import GraftError
from torchgraft.tasks.dense import PromptMatcher, StagePromptMatching, interim_loss
from torchgraft.tasks.dense.spm import default_rank

Stages = list[Callable[[Tensor], Tensor]]


def convnext() -> tuple[nn.Module, Stages, tuple[int, ...]]:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    first, *rest = model.stages
    return model, [nn.Sequential(model.stem, first), *rest], (8, 16, 24)


def efficientnet() -> tuple[nn.Module, Stages, tuple[int, ...]]:
    model = timm.create_model("efficientnet_lite0").eval()
    blocks = model.blocks
    first = nn.Sequential(model.conv_stem, model.bn1, *blocks[:2])
    stages = [first, blocks[2], nn.Sequential(*blocks[3:5]), nn.Sequential(*blocks[5:])]
    x, widths = torch.zeros(1, 3, 32, 32), []
    for stage in stages[:-1]:
        x = stage(x)
        widths.append(x.shape[1])
    return model, list(stages), tuple(widths)


def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def opened(matching: nn.Module) -> None:
    """Leave the identity."""
    for name, parameter in matching.named_parameters():
        if ".up." in f".{name}":
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("backbone", [convnext, efficientnet])
def test_matched_stages_start_as_the_frozen_ones(backbone: Callable[[], tuple[nn.Module, Stages, tuple]]) -> None:
    model, stages, widths = backbone()
    frozen(model)
    matching = StagePromptMatching(widths, num_classes=5)
    found, x = matching(stages, images()), images()
    for stage, matched in zip(stages, found.maps, strict=True):
        x = stage(x)
        assert torch.equal(matched, x)
    for boundary, matched in zip(found.interim, found.maps, strict=False):
        assert [each.shape for each in boundary] == [(2, 5, *matched.shape[-2:])] * 2


def test_a_vit_with_matchers_between_its_groups_of_blocks_starts_as_the_frozen_one() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, depth=4, num_heads=2, img_size=(64, 96), reg_tokens=2
    )
    frozen(model)
    matching = StagePromptMatching([32, 32, 32], num_classes=3)
    expected = model.forward_features(images())
    assert torch.equal(through_vit(model, matching)[0], expected)
    opened(matching)
    tokens, interim = through_vit(model, matching)
    assert not torch.allclose(tokens, expected)
    assert [each.shape for boundary in interim for each in boundary] == [(2, 3, 4, 6)] * 6


def through_vit(model: nn.Module, matching: StagePromptMatching) -> tuple[Tensor, list[list[Tensor]]]:
    hook = matching.hook(grid=(4, 6), prefix_tokens=model.num_prefix_tokens)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    for index, block in enumerate(model.blocks):
        x = hook(index, block(x))
    return model.norm(x), hook.interim


def test_prefix_tokens_pass_unchanged_and_patches_are_matched_as_a_map() -> None:
    matcher = PromptMatcher(24, num_classes=5, rank=8)
    opened(matcher)
    x, prefix = torch.randn(2, 24, 3, 4), torch.randn(2, 2, 24)
    found = matcher.match_tokens(torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1), (3, 4), prefix_tokens=2)
    assert torch.equal(found.output[:, :2], prefix)
    assert torch.allclose(found.output[:, 2:].transpose(1, 2).unflatten(2, (3, 4)), matcher(x).output, atol=1e-4)


def test_with_two_banks_the_prompt_is_made_of_the_second() -> None:
    torch.manual_seed(0)
    matcher = PromptMatcher(12, num_classes=3, rank=4, kernel=3, steps=1, tie_templates=False, groups=2)
    opened(matcher)
    x = torch.randn(2, 12, 3, 5)
    z = F.gelu(F.group_norm(torch.einsum("rc,bchw->brhw", matcher.down.weight[:, :, 0, 0], x), 2))
    z = z + matcher.dw(z)
    semantic = torch.einsum("brhw,kr->bkhw", z, matcher.templates) / 2
    prompt = torch.einsum("bkhw,kr->brhw", semantic.softmax(1), matcher.prompt_bank)
    found = matcher(x)
    assert torch.allclose(found.interim[0], semantic, atol=1e-5)
    assert torch.allclose(found.output, x + matcher.up(z + prompt), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("c", "k", "r", "side"), [(40, 5, 16, 5), (24, 3, 8, 3)])
def test_parameters_follow_the_formula(c: int, k: int, r: int, side: int, tied: bool) -> None:
    matcher = PromptMatcher(c, k, rank=r, kernel=side, tie_templates=tied)
    expected = 2 * c * r + c + r * side**2 + 3 * r + k * r + k + (0 if tied else k * r)
    assert sum(p.numel() for p in matcher.parameters()) == expected


def test_the_three_boundaries_of_convnext_atto_add_10839_parameters() -> None:
    matching = StagePromptMatching((40, 80, 160), num_classes=5)
    assert sum(p.numel() for p in matching.parameters()) == 10_839


def test_the_rank_grows_with_the_channels_within_bounds() -> None:
    assert [default_rank(c) for c in (24, 160, 512, 2048)] == [16, 16, 32, 64]


def test_at_the_start_only_the_interim_maps_move_what_is_behind_the_zero_convolution() -> None:
    torch.manual_seed(0)
    matcher = PromptMatcher(24, num_classes=5, rank=8)
    x, labels = torch.randn(2, 24, 6, 7), torch.randint(5, (2, 24, 28))

    def gradients(weight: float) -> dict[str, bool]:
        matcher.zero_grad()
        found = matcher(x)
        (found.output.square().mean() + weight * interim_loss([found.interim], labels)).backward()
        return {name: bool(p.grad.any()) for name, p in matcher.named_parameters()}

    assert all(gradients(0.4).values())
    assert {name for name, moves in gradients(0.0).items() if moves} == {"up.weight", "up.bias"}
    with torch.no_grad():
        for parameter in matcher.up.parameters():
            parameter -= 0.1 * parameter.grad
    assert all(gradients(0.0).values())


def test_training_moves_the_matchers_and_no_bit_of_the_backbone() -> None:
    model, stages, widths = efficientnet()
    frozen(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matching = StagePromptMatching(widths, num_classes=4)
    opened(matching)
    optimizer = torch.optim.SGD(matching.parameters(), lr=0.1)
    found = matching(stages, images())
    loss = found.maps[-1].square().mean() + interim_loss(found.interim, torch.randint(4, (2, 64, 96)))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in matching.parameters())
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_interim_loss_is_the_mean_over_boundaries_and_steps() -> None:
    maps = [torch.randn(1, 3, size, size) for size in (8, 4, 2)]
    labels = torch.randint(3, (1, 8, 8))
    single = [interim_loss([[each]], labels) for each in maps]
    assert torch.allclose(interim_loss([maps[:2], maps[2:]], labels), torch.stack(single).mean())


def test_a_matcher_works_in_the_type_it_is_made_in() -> None:
    matcher = PromptMatcher(24, num_classes=5, dtype=torch.float64)
    found = matcher(torch.randn(1, 24, 1, 3, dtype=torch.float64))
    assert found.output.dtype == found.interim[-1].dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"kernel": 4}, "expected an odd number"),
        ({"rank": 8, "groups": 3}, "groups=3 do not divide rank=8"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_options_that_cannot_be_built_are_named(options: dict, part: str) -> None:
    with pytest.raises(GraftError, match=part):
        PromptMatcher(24, 5, **options)


def test_what_does_not_fit_the_matchers_is_named() -> None:
    matching = StagePromptMatching((24,), num_classes=5)
    matcher = matching.matchers[0]
    with pytest.raises(GraftError, match=r"expected a map \(B, 24, h, w\)"):
        matcher(torch.zeros(1, 8, 4, 4))
    with pytest.raises(GraftError, match=r"1 \+ 2 \* 3"):
        matcher.match_tokens(torch.zeros(1, 6, 24), (2, 3), prefix_tokens=1)
    with pytest.raises(GraftError, match="1 stages for 1 matchers"):
        matching([nn.Identity()], torch.zeros(1, 24, 4, 4))
    with pytest.raises(GraftError, match="channels"):
        StagePromptMatching((), num_classes=5)
    with pytest.raises(GraftError, match="no interim map"):
        interim_loss([], torch.zeros(1, 4, 4, dtype=torch.long))


def test_a_matcher_makes_every_tensor_on_the_device_of_its_input() -> None:
    found = PromptMatcher(24, num_classes=5, device="meta")(torch.empty(1, 24, 4, 5, device="meta"))
    loss = interim_loss([found.interim], torch.empty(1, 16, 20, dtype=torch.long, device="meta"))
    assert found.output.is_meta and loss.is_meta
