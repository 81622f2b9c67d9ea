import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from torchgraft.data.dense import load_segmentation
from torchgraft.data.segmentation import collate_segmentation
from torchgraft.errors import GraftError

from .conftest import cut_off, save_picture
from .test_coco import coco


def save_mask(path, values=(0, 1, 2), *, palette=None, size=(64, 48), dtype=np.uint8):
    """Stripes of ``values`` from left to right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    columns = np.asarray(values)[np.arange(width) * len(values) // width]
    image = Image.fromarray(np.tile(columns, (height, 1)).astype(dtype))
    if palette is not None:
        image.putpalette(palette)
    image.save(path)
    return path


def folder(root, *, part="", count=5, classes="sky\nroad\ncar\n", images="images", masks="masks", **options):
    for i in range(count):
        save_picture(root / images / part / f"p{i}.jpg", seed=i)
        save_mask(root / masks / part / f"p{i}.png", **options)
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root


def test_an_item_is_an_image_and_a_mask_of_class_numbers(tmp_path):
    data = load_segmentation(folder(tmp_path, values=(0, 2, 255)))
    image, mask = data.train[0]
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    assert type(mask).__name__ == "Mask" and mask.shape == (48, 64) and mask.dtype == torch.int64
    assert mask.unique().tolist() == [0, 2, 255]
    assert data.classes == ("sky", "road", "car")
    assert data.palette is None and data.ignore_index == 255


def test_a_palette_is_kept_and_its_numbers_are_the_classes(tmp_path):
    data = load_segmentation(folder(tmp_path, palette=[9, 8, 7, 1, 2, 3, 200, 100, 50]))
    assert data.palette == ((9, 8, 7), (1, 2, 3), (200, 100, 50))
    assert data.train[0][1].unique().tolist() == [0, 1, 2]


def test_without_names_the_classes_are_numbered_up_to_the_largest_value(tmp_path):
    data = load_segmentation(folder(tmp_path, classes=None, values=(0, 3, 255)))
    assert data.classes == ("class 0", "class 1", "class 2", "class 3")


def test_sixteen_bit_masks_hold_more_than_255_classes(tmp_path):
    folder(tmp_path, classes=None, values=(0, 255, 300), dtype=np.uint16)
    with pytest.raises(GraftError, match="301 classes, but 255 means ignored"):
        load_segmentation(tmp_path)
    data = load_segmentation(tmp_path, ignore_index=65535)
    assert len(data.classes) == 301 and data.train[0][1].unique().tolist() == [0, 255, 300]


def test_val_is_split_off_by_the_seed_and_part_folders_are_kept(tmp_path):
    data = load_segmentation(folder(tmp_path / "a", count=10), seed=3)
    assert (len(data.train), len(data.val), data.test) == (8, 2, None)
    assert load_segmentation(tmp_path / "a", seed=3).val.ids == data.val.ids
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        folder(tmp_path / "b", part=part, count=count)
        folder(tmp_path / "c" / part, count=count)
    (tmp_path / "c" / "classes.txt").write_text("sky\nroad\ncar\n")
    for root in (tmp_path / "b", tmp_path / "c"):
        data = load_segmentation(root)
        assert (len(data.train), len(data.val), len(data.test)) == (4, 2, 3)


def test_ade20k_folders_ignore_0_and_count_from_1(tmp_path):
    for part in ("training", "validation"):
        folder(tmp_path, part=part, masks="annotations", values=(0, 1, 3))
    data = load_segmentation(tmp_path)
    assert data.train[0][1].unique().tolist() == [0, 2, 255]
    (tmp_path / "classes.txt").unlink()
    assert load_segmentation(tmp_path).classes == ("class 0", "class 1", "class 2")


def test_cityscapes_ids_become_train_ids(tmp_path):
    for part in ("train", "val"):
        save_picture(tmp_path / "leftImg8bit" / part / "ulm" / "ulm_1_leftImg8bit.png")
        save_mask(tmp_path / "gtFine" / part / "ulm" / "ulm_1_gtFine_labelIds.png", values=(0, 7, 26, 33))
        save_mask(tmp_path / "gtFine" / part / "ulm" / "ulm_1_gtFine_instanceIds.png", values=(1, 2))
    data = load_segmentation(tmp_path)
    assert len(data.classes) == 19 and data.classes[13] == "car"
    assert data.train[0][1].unique().tolist() == [0, 13, 18, 255]
    for part in ("train", "val"):
        save_mask(tmp_path / "gtFine" / part / "ulm" / "ulm_1_gtFine_labelTrainIds.png", values=(5, 255))
    assert load_segmentation(tmp_path).train[0][1].unique().tolist() == [5, 255]


def test_a_value_that_is_no_class_is_named_with_its_count(tmp_path):
    folder(tmp_path)
    save_mask(tmp_path / "masks" / "p3.png", values=(0, 7))
    with pytest.raises(GraftError, match=r"p3.png holds the value 7 in 1536 pixels, which is no class") as caught:
        load_segmentation(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_size_is_named_with_both_sizes(tmp_path):
    folder(tmp_path)
    save_mask(tmp_path / "masks" / "p3.png", size=(32, 48))
    with pytest.raises(GraftError, match=r"p3.png has 32x48 pixels, but .*p3.jpg has 64x48"):
        load_segmentation(tmp_path)


def test_a_picture_or_mask_without_partner_is_named(tmp_path):
    root = folder(tmp_path)
    (root / "masks" / "p1.png").unlink()
    with pytest.raises(GraftError, match=r"1 of 5 images have no mask, for example .*p1.jpg"):
        load_segmentation(root)
    (root / "images" / "p1.jpg").unlink()
    (root / "images" / "p2.jpg").unlink()
    with pytest.raises(GraftError, match=r"1 of 4 masks have no image, for example .*p2.png"):
        load_segmentation(root)


def test_masks_of_colours_are_refused(tmp_path):
    folder(tmp_path)
    save_picture(tmp_path / "masks" / "p1.png")
    with pytest.raises(GraftError, match=r"p1.png holds colours \(RGB\) in place of class numbers"):
        load_segmentation(tmp_path)


def test_a_mask_that_is_no_picture_is_named(tmp_path):
    folder(tmp_path)
    (tmp_path / "masks" / "p1.png").write_text("garbage")
    with pytest.raises(GraftError, match=r"cannot read the mask .*p1.png"):
        load_segmentation(tmp_path)


def test_black_and_white_masks_of_0_and_255_are_explained(tmp_path):
    with pytest.raises(GraftError, match=r"hold only \[0, 255\], where 255 means ignored"):
        load_segmentation(folder(tmp_path, classes=None, values=(0, 255)))


def test_a_damaged_picture_is_left_out_and_listed_or_refused(tmp_path):
    folder(tmp_path)
    cut_off(tmp_path / "images" / "p4.jpg")
    data = load_segmentation(tmp_path)
    assert [s.path for s in data.skipped] == [str(tmp_path / "images" / "p4.jpg")]
    assert len(data.train) + len(data.val) == 4
    with pytest.raises(GraftError, match=r"p4.jpg"):
        load_segmentation(tmp_path, strict=True)


def test_a_batch_is_two_plain_tensors(tmp_path):
    data = load_segmentation(folder(tmp_path))
    images, masks = next(iter(DataLoader(data.train, 2, collate_fn=collate_segmentation)))
    assert images.shape == (2, 3, 48, 64) and masks.shape == (2, 48, 64)
    assert type(images) is torch.Tensor and type(masks) is torch.Tensor


def test_instance_masks_of_a_coco_file_are_painted_small_over_large_and_crowds_are_ignored(tmp_path):
    def change(table):
        first = table["annotations"][0]
        table["annotations"] += [
            first | {"id": 1, "category_id": 90, "area": 20.0, "segmentation": [[12, 12, 17, 12, 17, 16, 12, 16]]},
            first | {"id": 2, "iscrowd": 1, "segmentation": {"size": [48, 64], "counts": [0, 48 * 20, 48 * 44]}},
        ]

    data = load_segmentation(coco(tmp_path, change=change))
    assert data.classes == ("background", "cat", "tooth")
    masks = {i: part[k][1] for part in (data.train, data.val) for k, i in enumerate(part.ids)}
    mask = masks["p0.png"]
    assert mask.dtype == torch.int64 and mask.unique().tolist() == [0, 1, 2, 255]
    assert (mask == 2).sum() == 20 and (mask == 1).sum() == 300 - 20 and mask[0, 0] == 255
    assert masks["p3.png"].unique().tolist() == [0]
    assert data.train.fingerprint() == load_segmentation(tmp_path).train.fingerprint()
    with pytest.raises(GraftError, match="ignore_index=1 is one of the 3 classes"):
        load_segmentation(tmp_path, ignore_index=1)
