"""The segmentation heads: shapes, definitions, what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from torchgraft.errors import GraftError
from torchgraft.tasks.heads import (
    FCN,
    HEADS,
    Auxiliary,
    FeaturePyramid,
    Linear,
    SemanticFPN,
    SemanticFPNHead,
    UPerNet,
    segmentation_head,
)

CHANNELS, STRIDES, SIZES = (6, 8, 10, 12), (4, 8, 16, 32), ((21, 18), (11, 9), (6, 5), (3, 3))
CLASSES = 5


def maps(levels: int = 4, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, c, *size) for c, size in zip(CHANNELS[:levels], SIZES[:levels], strict=True)]


def build(name: str, levels: int = 4, **options: object) -> nn.Module:
    if name != "linear":
        options.setdefault("width", 8)
    torch.manual_seed(1)
    return segmentation_head(name, CHANNELS[:levels], STRIDES[:levels], CLASSES, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("name", HEADS)
def test_logits_have_the_size_of_the_finest_map(name: str, levels: int) -> None:
    assert build(name, levels)(maps(levels)).shape == (2, CLASSES, *SIZES[0])


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_gets_a_gradient_that_is_not_all_zero(name: str, norm: str) -> None:
    head = build(name, norm=norm, dropout=0.0)
    head(maps()).square().sum().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", HEADS)
def test_the_last_convolution_starts_small_and_without_bias(name: str) -> None:
    width = {} if name == "linear" else {"width": 64}
    head = segmentation_head(name, (512,), (4,), 40, **width)  # type: ignore[arg-type]
    (last,) = (m for m in head.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 40)
    assert last.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert last.bias is not None and not last.bias.any()


@pytest.mark.parametrize(("name", "width"), [("fcn", 256), ("semantic-fpn", 256), ("upernet", 512)])
def test_the_default_width_is_the_published_one(name: str, width: int) -> None:
    with torch.device("meta"):
        head = segmentation_head(name, CHANNELS, STRIDES, CLASSES)
    assert [m.in_channels for m in head.modules() if isinstance(m, nn.Conv2d)][-1] == width


def test_semantic_fpn_on_the_maps_of_a_resnet50_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        head = SemanticFPN((256, 512, 1024, 2048 + 150), STRIDES, 150)
    assert sum(p.numel() for p in head.neck.parameters()) == 3_382_784
    assert sum(p.numel() for p in head.head.parameters()) == 4_170_902


def test_the_documented_parameter_counts_hold() -> None:
    d, f, k, q = 8, 12, CLASSES, 4
    upernet = q * (12 * d + 2 * d) + 9 * (12 + q * d) * d + 2 * d + 9 * 4 * d * d + 2 * d + d * k + k
    upernet += sum(c * d + 9 * d * d + 4 * d for c in CHANNELS[:3])
    assert sum(p.numel() for p in build("upernet").parameters()) == upernet
    fpn = sum(c * f + f + 9 * f * f + f for c in CHANNELS) + d * k + k
    fpn += sum(9 * f * d + 9 * d * d * (n - 1) + 2 * d * n for n in (1, 1, 2, 3))
    head = SemanticFPN(CHANNELS, STRIDES, k, fpn_width=f, width=d)
    assert sum(p.numel() for p in head.parameters()) == fpn


def test_linear_is_one_1x1_convolution_of_all_maps_resized_to_the_finest() -> None:
    head = Linear(CHANNELS, CLASSES).eval()
    nn.init.normal_(head.classifiers[0].bias)  # type: ignore[arg-type]
    found = [F.interpolate(x, size=SIZES[0], mode="bilinear", align_corners=False) for x in maps()]
    weight = torch.cat([c.weight for c in head.classifiers], 1)  # type: ignore[list-item]
    expected = F.conv2d(torch.cat(found, 1), weight, head.classifiers[0].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(head(maps()), expected)


def test_the_neck_equals_torchvisions_pyramid_where_sizes_do_not_halve() -> None:
    neck = FeaturePyramid(CHANNELS, 8)
    theirs = FeaturePyramidNetwork(list(CHANNELS), 8)
    with torch.no_grad():
        for i in range(4):
            for ours, other in ((neck.lateral_convs[i], theirs.inner_blocks), (neck.fpn_convs[i], theirs.layer_blocks)):
                other[i][0].weight.copy_(ours.conv.weight)  # type: ignore[index, union-attr]
                other[i][0].bias.copy_(ours.conv.bias)  # type: ignore[index, union-attr]
    expected = theirs({str(i): x for i, x in enumerate(maps())})
    for ours, other in zip(neck(maps()), expected.values(), strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize(
    ("strides", "convs", "ups"),
    [((4, 8, 16, 32), (1, 1, 2, 3), (0, 1, 2, 3)), ((16, 16), (1, 1), (0, 0)), ((8, 16), (1, 1), (0, 1))],
)
def test_a_level_is_doubled_until_it_has_the_stride_of_the_finest(
    strides: Sequence[int], convs: Sequence[int], ups: Sequence[int]
) -> None:
    head = SemanticFPNHead(8, strides, CLASSES, width=8)
    found = [[type(m).__name__ for m in level] for level in head.scale_heads]  # type: ignore[union-attr]
    assert [level.count("ConvNorm") for level in found] == list(convs)
    assert [level.count("Upsample") for level in found] == list(ups)


@pytest.mark.parametrize(
    ("strides", "level"), [((4, 8, 16, 32), 2), ((16, 16, 16, 16), 3), ((4, 8, 32, 64), 1), ((32, 64, 64, 64), 0)]
)
def test_fcn_reads_the_last_map_whose_stride_is_not_above_16(strides: Sequence[int], level: int) -> None:
    head = FCN(CHANNELS, strides, CLASSES, width=8).eval()
    base = head(maps())
    for i in range(4):
        changed = maps()
        changed[i] += 1
        assert torch.equal(head(changed), base) == (i != level)


def test_the_auxiliary_head_gives_logits_of_the_size_of_its_own_map() -> None:
    auxiliary = Auxiliary(width=8)
    assert auxiliary.loss_weight == 0.4
    assert auxiliary.build(CHANNELS, STRIDES, CLASSES)(maps()).shape == (2, CLASSES, *SIZES[2])


def test_upernet_cannot_train_batch_norm_on_one_image_and_names_the_remedy() -> None:
    with pytest.raises(GraftError, match='norm="group"') as raised:
        build("upernet").train()(maps(batch=1))
    assert "\n" not in str(raised.value)


def test_upernet_takes_one_image_in_evaluation_and_with_group_norm() -> None:
    assert build("upernet").eval()(maps(batch=1)).isfinite().all()
    head = build("upernet", norm="group", dropout=0.0).train()
    head(maps(batch=1)).square().sum().backward()
    for module in head.psp_modules:  # type: ignore[union-attr]
        assert module[1].conv.weight.grad.any()  # group norm of one channel on a 1x1 map would give none


def test_dropout_drops_whole_channels_in_training_only() -> None:
    head, seen = UPerNet(CHANNELS, CLASSES, width=16, dropout=0.5), []
    head.conv_seg.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = maps()
    head.train()(found)
    head.eval()(found)
    alive = [x.flatten(2).any(2).float().mean().item() for x in seen]
    assert alive[1] == 1.0
    assert 0.2 < alive[0] < 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "upernets"}, "did you mean 'upernet'"),
        ({"channels": (), "strides": ()}, "one map or more"),
        ({"strides": (4, 8)}, "one of each per map"),
        ({"strides": (32, 16, 8, 4)}, "high to low"),
        ({"num_classes": 0}, "at least 1"),
        ({"norm": "layer"}, "'batch' or 'group'"),
        ({"dropout": 1.0}, "probability"),
        ({"width": 1}, "at least 2"),
        ({"name": "linear", "width": 8}, "no width"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    given = {"name": "upernet", "channels": CHANNELS, "strides": STRIDES, "num_classes": CLASSES, **changes}
    with pytest.raises(GraftError, match=message) as raised:
        segmentation_head(**given)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", HEADS)
def test_other_maps_than_the_head_was_built_for_are_refused(name: str) -> None:
    head = build(name)
    for wrong in (maps(3), maps()[::-1], [x[0] for x in maps()]):
        with pytest.raises(GraftError, match="this head expects 4"):
            head(wrong)
