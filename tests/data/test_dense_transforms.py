import pytest
import torch
from torchvision import tv_tensors

from torchgraft.data.dense_transforms import (
    VariedCrop,
    dense_eval_from,
    detection_transforms,
    segmentation_transforms,
)
from torchgraft.errors import GraftError

AUGMENTS = ("light", "none", "standard")
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def item(boxes, *, crowd=(), masks=True, size=(40, 60)):
    """An image that is bright inside the boxes, so that it can be seen whether boxes and masks moved along."""
    height, width = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    drawn = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for layer, (x1, y1, x2, y2) in zip(drawn, boxes, strict=True):
        layer[y1:y2, x1:x2] = True
        image[:, y1:y2, x1:x2] = 255
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=size
        ),
        "labels": torch.arange(1, len(boxes) + 1),
        "area": torch.full((len(boxes),), 7.0),
        "iscrowd": torch.tensor([i in crowd for i in range(len(boxes))], dtype=torch.bool),
        "image_id": 5,
    }
    if masks:
        target["masks"] = tv_tensors.Mask(drawn)
    return tv_tensors.Image(image), target


def lengths(target):
    return {len(target[k]) for k in ("boxes", "labels", "area", "iscrowd", "masks") if k in target}


def test_evaluation_scales_boxes_masks_and_area_with_the_picture():
    image, target = detection_transforms(120).eval(*item([(10, 10, 30, 20), (0, 0, 60, 40)]))
    assert image.shape == (3, 80, 120) and image.dtype == torch.float32 and image.max() <= 1
    assert target["boxes"].tolist() == [[20, 20, 60, 40], [0, 0, 120, 80]]
    assert target["masks"].shape == (2, 80, 120) and target["masks"].dtype == torch.bool
    assert target["area"].tolist() == [800, 9600]
    assert target["image_id"] == 5 and target["labels"].tolist() == [1, 2]


def test_area_is_that_of_the_box_where_there_are_no_masks():
    _, target = detection_transforms(30).eval(*item([(10, 10, 30, 20)], masks=False))
    assert target["area"].tolist() == [50]


def test_evaluation_keeps_tiny_and_crowd_boxes_and_training_leaves_them_out():
    sample = item([(0, 0, 1, 1), (10, 10, 50, 30), (20, 5, 55, 35)], crowd=[2])
    transforms = detection_transforms(30)
    _, seen = transforms.eval(*sample)
    assert seen["labels"].tolist() == [1, 2, 3]
    _, trained = transforms.train(*sample)
    assert trained["labels"].tolist() == [2]
    assert lengths(trained) == {1} and not trained["iscrowd"].any()


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("masks", [True, False])
def test_a_picture_without_boxes_passes_through(augment, masks):
    transforms = detection_transforms(48, augment=augment)
    for transform in (transforms.train, transforms.eval):
        image, target = transform(*item([], masks=masks))
        assert image.dtype == torch.float32 and max(image.shape) == 48
        assert target["boxes"].shape == (0, 4) and lengths(target) == {0}
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        if masks:
            assert target["masks"].shape == (0, *image.shape[-2:])


@pytest.mark.parametrize("augment", AUGMENTS)
def test_boxes_masks_and_pixels_stay_together_through_training(augment):
    torch.manual_seed(0)
    sample = item([(10, 10, 30, 20), (35, 5, 55, 35)])
    seen = 0
    for _ in range(20):
        image, target = detection_transforms(96, augment=augment).train(*sample)
        assert len(lengths(target)) == 1
        height, width = image.shape[-2:]
        assert target["boxes"].canvas_size == (height, width) and max(height, width) == 96
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            # A mask ends at a whole pixel, a box does not.
            assert (around - box).abs().max() <= 1
            seen += 1
        assert torch.equal(target["area"], target["masks"].flatten(1).sum(1).float())
    assert seen >= 20


def test_mirroring_happens_only_where_it_is_allowed():
    torch.manual_seed(0)
    sample = item([(0, 10, 20, 20)])
    starts = {
        (augment, mirror): {
            detection_transforms(60, augment=augment, mirror=mirror).train(*sample)[1]["boxes"][0, 0].item()
            for _ in range(20)
        }
        for augment, mirror in (("light", True), ("light", False), ("none", True))
    }
    assert starts == {("light", True): {0.0, 40.0}, ("light", False): {0.0}, ("none", True): {0.0}}


@pytest.mark.parametrize("augment", AUGMENTS)
def test_segmentation_keeps_class_numbers_whole_and_moves_them_with_the_picture(augment):
    torch.manual_seed(0)
    values = torch.zeros(40, 60, dtype=torch.int64)
    values[:, 30:] = 2
    values[:5] = 255
    image = tv_tensors.Image((values == 2).to(torch.uint8).mul(255).expand(3, -1, -1).clone())
    transforms = segmentation_transforms(32, augment=augment, **HALF)
    for _ in range(10):
        for transform in (transforms.train, transforms.eval):
            moved, mask = transform(image, tv_tensors.Mask(values))
            assert moved.shape == (3, 32, 32) and mask.shape == (32, 32)
            assert mask.dtype == torch.int64 and set(mask.unique().tolist()) <= {0, 2, 255}
            assert isinstance(mask, tv_tensors.Mask)
    moved, mask = transforms.eval(image, tv_tensors.Mask(values))
    assert moved.min() == -1 and moved.max() == 1
    assert (moved[0][mask == 2] > 0.9).float().mean() > 0.9


def test_a_small_picture_is_filled_up_with_the_ignored_value():
    image, mask = VariedCrop(16, 9)(tv_tensors.Image(torch.ones(3, 8, 8)), tv_tensors.Mask(torch.ones(8, 8).long()))
    assert image.shape == (3, 16, 16) and (mask == 9).sum() == 16 * 16 - 64
    assert (image[0] == 1).equal(mask == 1)


def test_the_varied_crop_avoids_a_single_class():
    torch.manual_seed(0)
    values = torch.zeros(64, 64, dtype=torch.int64)
    values[:, 20:44] = 1
    image, crop = tv_tensors.Image(torch.zeros(3, 64, 64)), VariedCrop(24, 255)
    shares = [crop(image, tv_tensors.Mask(values))[1].float().mean().item() for _ in range(20)]
    assert all(0.25 <= share <= 0.75 for share in shares)


def test_evaluation_is_rebuilt_from_its_configuration_and_takes_a_picture_alone():
    for transforms in (detection_transforms(30), segmentation_transforms(32, **HALF)):
        image, target = item([(10, 10, 30, 20)])
        expected = transforms.eval(image, target["masks"] if "mean" in transforms.config else target)[0]
        assert torch.equal(dense_eval_from(transforms.config)(image), expected)


def test_wrong_settings_are_refused():
    with pytest.raises(GraftError, match="unknown augment 'ligth'; did you mean 'light'"):
        detection_transforms(32, augment="ligth")
    with pytest.raises(GraftError, match="image_size=0"):
        segmentation_transforms(0, **HALF)
    with pytest.raises(GraftError, match="has task None"):
        dense_eval_from({})
    with pytest.raises(GraftError, match="lacks mean, std"):
        dense_eval_from({"task": "segmentation", "image_size": 3})
