import json
import warnings

import numpy as np
import pytest
import torch

from torchgraft.data.dense import load_detection
from torchgraft.data.shapes import decode_counts, read_polygons, read_rle
from torchgraft.errors import GraftError

from .conftest import cut_off, save_picture

SQUARE = [[10, 10, 30, 10, 30, 25, 10, 25]]


def coco(root, *, name="annotations.json", images=4, change=None):
    """Four pictures of 64x48; picture 3 (and every fourth) has no objects; category ids 7 and 90."""
    table = {
        "images": [{"id": 10 + i, "file_name": f"p{i}.png", "width": 64, "height": 48} for i in range(images)],
        "categories": [{"id": 90, "name": "tooth"}, {"id": 7, "name": "cat"}],
        "annotations": [
            {
                "id": 100 + i,
                "image_id": 10 + i,
                "category_id": 90 if i % 2 else 7,
                "bbox": [10, 10, 20, 15],
                "area": 250.0,
                "segmentation": SQUARE,
                "iscrowd": 0,
            }
            for i in range(images)
            if i % 4 != 3
        ],
    }
    if change is not None:
        change(table)
    root.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        if not (root / f"p{i}.png").exists():
            save_picture(root / f"p{i}.png", seed=i)
    (root / name).write_text(json.dumps(table))
    return root / name


def items(data):
    return {r.id: data_part[i] for data_part in (data.train, data.val) for i, r in enumerate(data_part.records)}


def test_sparse_category_ids_become_1_to_k_and_lead_back(tmp_path):
    data = load_detection(coco(tmp_path))
    assert data.classes == ("cat", "tooth")
    assert data.category_ids == (7, 90)
    assert [data.label_of(7), data.label_of(90)] == [1, 2]
    assert [data.category_of(1), data.category_of(2)] == [7, 90]
    assert items(data)["p1.png"][1]["labels"].tolist() == [2]
    with pytest.raises(GraftError, match="no category 8"):
        data.label_of(8)
    with pytest.raises(GraftError, match="label 0"):
        data.category_of(0)


def test_an_item_has_typed_tensors_and_the_sources_area(tmp_path):
    image, target = items(load_detection(coco(tmp_path)))["p0.png"]
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    assert type(target["boxes"]).__name__ == "BoundingBoxes" and target["boxes"].canvas_size == (48, 64)
    assert target["boxes"].tolist() == [[10, 10, 30, 25]]
    assert target["area"].tolist() == [250.0]
    assert target["iscrowd"].dtype == torch.bool
    assert target["image_id"] == 10
    assert target["masks"].shape == (1, 48, 64) and target["masks"].dtype == torch.bool
    assert target["masks"][0, 10:25, 10:30].all() and target["masks"].sum() == 300


def test_a_picture_without_annotations_has_empty_tensors_of_the_right_shapes(tmp_path):
    _, target = items(load_detection(coco(tmp_path)))["p3.png"]
    shapes = {k: tuple(v.shape) for k, v in target.items() if k != "image_id"}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "area": (0,), "iscrowd": (0,), "masks": (0, 48, 64)}
    assert target["labels"].dtype == torch.int64


def test_masks_are_there_only_if_every_object_has_one_or_they_are_asked_for(tmp_path):
    file = coco(tmp_path, change=lambda t: t["annotations"][0].pop("segmentation"))
    assert not load_detection(file).has_masks
    with pytest.raises(GraftError, match="annotation 100: no segmentation"):
        load_detection(file, masks=True)
    assert "masks" not in load_detection(coco(tmp_path), masks=False).train[0][1]


def test_val_is_split_off_by_the_seed_and_given_parts_are_kept(tmp_path):
    file = coco(tmp_path / "one", images=20)
    first = load_detection(file, seed=1)
    assert (len(first.train), len(first.val), first.test) == (16, 4, None)
    assert load_detection(file, seed=1).val.ids == first.val.ids
    assert load_detection(file, seed=2).val.ids != first.val.ids
    for part in ("train", "valid", "test"):
        coco(tmp_path / "three" / part, name="_annotations.coco.json")
    data = load_detection(tmp_path / "three")
    assert (len(data.train), len(data.val), len(data.test)) == (4, 4, 4)


def test_the_layout_of_coco_itself_is_found(tmp_path):
    for part in ("train2017", "val2017"):
        coco(tmp_path / "annotations", name=f"instances_{part}.json")
        (tmp_path / part).mkdir()
        for picture in list((tmp_path / "annotations").glob("*.png")):
            picture.rename(tmp_path / part / picture.name)
    (tmp_path / "annotations" / "captions_train2017.json").write_text('{"images": [], "annotations": []}')
    data = load_detection(tmp_path)
    assert (len(data.train), len(data.val)) == (4, 4)
    assert data.val.records[0].path.parent.name == "val2017"


def test_the_folder_of_the_pictures_can_be_given(tmp_path):
    file = coco(tmp_path / "pictures")
    moved = file.rename(tmp_path / "elsewhere.json")
    assert len(load_detection(moved, images=tmp_path / "pictures").train) == 3
    with pytest.raises(GraftError, match="none of its 4 images"):
        load_detection(moved)


def annotation(**changes):
    return lambda table: table["annotations"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (annotation(category_id=8), "annotation 100: there is no category 8"),
        (annotation(image_id=99), "annotation 100: there is no image 99"),
        (
            annotation(bbox=[70, 10, 5, 5]),
            r"annotation 100: the box \(70, 10, 75, 15\) is outside its picture of 64x48",
        ),
        (annotation(bbox=[5, 5, -2, 5]), "annotation 100: the box .* negative width"),
        (annotation(bbox=[5, 5, float("nan"), 5]), "annotation 100: the box .* not finite"),
        (annotation(bbox=[1, 2, 3]), "annotation 100: bbox is .1, 2, 3.; expected x, y, width, height"),
        (annotation(area=-1), "annotation 100: area is -1"),
        (annotation(segmentation=[[1, 2, 3, 4]]), "annotation 100: a polygon .* three corners .* 4 values"),
        (annotation(segmentation=[["a"] * 6]), "annotation 100: a polygon holds something that is no number"),
        (annotation(segmentation={"size": [48, 64], "counts": "\n!!"}), "annotation 100: .* damaged at character 0"),
        (annotation(segmentation={"size": [48, 64], "counts": [5, 5]}), "covers 10 pixels but the picture has 3072"),
        (
            annotation(segmentation={"size": [9, 9], "counts": [81]}),
            r"has size \[9, 9\], but the picture .* \[48, 64\]",
        ),
        (annotation(segmentation={"size": [48, 64], "counts": None}), "annotation 100: the counts"),
        (annotation(segmentation={"counts": [1]}), "annotation 100: a run-length mask needs size and counts"),
        (lambda t: t["annotations"][0].pop("bbox"), "entry 0 of annotations has no bbox"),
        (lambda t: t["annotations"].clear(), "empty list of annotations"),
        (lambda t: t["images"].clear(), "empty list of images"),
        (lambda t: t["categories"].clear(), "has no categories"),
        (lambda t: t["categories"].append({"id": 7, "name": "dog"}), "category 7, 'dog', is there twice"),
        (lambda t: t["images"].append(t["images"][0]), "the image id 10 is there twice"),
        (lambda t: t["images"][2].update(width=65), "image 12 is said to be 65x48 pixels, but .*p2.png has 64x48"),
        (lambda t: t["images"][1].update(file_name="gone.png"), "1 of 4 images are missing, for example .*gone.png"),
        (lambda t: t.pop("categories"), "no COCO json: it lacks the list 'categories'"),
    ],
)
def test_a_wrong_entry_is_named_in_one_line(tmp_path, change, message):
    file = coco(tmp_path, change=change)
    with pytest.raises(GraftError, match=message) as caught:
        load_detection(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("{", "is no json"), ("[1]", "holds a list"), ('{"shapes": []}', "holds shapes")],
)
def test_a_file_of_another_format_is_refused(tmp_path, text, message):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(GraftError, match=message):
        load_detection(tmp_path / "other.json")


def test_clipped_and_dropped_boxes_are_counted_in_one_warning(tmp_path):
    def change(table):
        table["annotations"][0]["bbox"] = [50, 10, 20, 15]
        table["annotations"].append(table["annotations"][0] | {"id": 7, "bbox": [5, 5, 0, 3]})

    file = coco(tmp_path, change=change)
    with pytest.warns(UserWarning, match=r"1 boxes clipped .* and 1 boxes without area dropped.*annotation 100"):
        data = load_detection(file)
    assert (data.clipped, data.dropped) == (1, 1)
    target = items(data)["p0.png"][1]
    assert target["boxes"].tolist() == [[50, 10, 64, 25]]
    assert len(target["labels"]) == len(target["area"]) == len(target["masks"]) == 1
    with pytest.raises(GraftError, match=r"annotation 100: .* reaches outside"):
        load_detection(file, strict=True)


def test_rounding_at_the_border_is_not_reported(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_detection(coco(tmp_path, change=annotation(bbox=[44, 33, 20.01, 15.02])))
    assert data.clipped == 0
    assert items(data)["p0.png"][1]["boxes"].tolist() == [[44, 33, 64, 48]]


def test_a_damaged_picture_is_left_out_and_listed_or_refused(tmp_path):
    file = coco(tmp_path)
    cut_off(tmp_path / "p0.png")
    data = load_detection(file)
    assert [s.path for s in data.skipped] == [str(tmp_path / "p0.png")]
    assert "p0.png" not in data.train.ids + data.val.ids
    with pytest.raises(GraftError, match=r"p0.png"):
        load_detection(file, strict=True)


def test_parts_with_other_categories_are_refused(tmp_path):
    coco(tmp_path / "train")
    coco(tmp_path / "val", change=lambda t: t["categories"][0].update(name="horse"))
    with pytest.raises(GraftError, match=r"category 90 is 'horse', but .* has 'tooth'"):
        load_detection(tmp_path)


def test_two_files_for_one_part_are_refused(tmp_path):
    coco(tmp_path, name="train_a.json")
    coco(tmp_path, name="train_b.json")
    with pytest.raises(GraftError, match="two COCO files for train"):
        load_detection(tmp_path)


def encode(mask):
    """Compressed run lengths, written from the format's description and independent of the decoder."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(np.int8)])))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    text = ""
    for i, run in enumerate(runs):
        value = run - (runs[i - 2] if i > 2 else 0)
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr(digit + 32 * more + 48)
            if not more:
                break
    return text, runs


@pytest.mark.parametrize("seed", range(4))
def test_compressed_and_plain_run_lengths_give_the_mask_back(seed):
    mask = np.random.RandomState(seed).rand(37, 23) < (0.02, 0.3, 0.7, 0.99)[seed]
    text, runs = encode(mask)
    assert decode_counts(text, "").tolist() == runs
    for counts in (text, runs):
        drawn = read_rle({"size": [37, 23], "counts": counts}, (37, 23), "").draw(37, 23)
        assert (drawn == mask).all()


def test_a_run_length_text_worked_out_by_hand_decodes_to_its_counts():
    # 10 zeros, 4 ones, 6 zeros, 5 ones; the fourth count is written as 5 - 4 = 1.
    assert decode_counts(":461", "").tolist() == [10, 4, 6, 5]
    with pytest.raises(GraftError, match="middle of a count"):
        decode_counts(":46Q", "")


def test_a_polygon_covers_the_pixels_whose_centres_are_inside():
    triangle = read_polygons([[0, 0, 8, 0, 0, 8]], "").draw(8, 8)
    rows, columns = np.mgrid[:8, :8]
    assert (triangle == (rows + columns + 1 < 8)).all()
    two = read_polygons([[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]], "").draw(4, 4)
    assert two.sum() == 7
    beyond = read_polygons([[-5, -5, 20, -5, 20, 20, -5, 20]], "").draw(4, 6)
    assert beyond.shape == (4, 6) and beyond.all()
