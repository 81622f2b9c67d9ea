import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from torchgraft.data.dense import detect_task, load_detection, load_segmentation
from torchgraft.data.detection import collate_detection, picture_size
from torchgraft.errors import GraftError

from .conftest import save_picture
from .test_coco import coco
from .test_masks import folder
from .test_yolo import yolo


def test_the_task_is_told_from_what_is_there(tmp_path, tree):
    assert detect_task(coco(tmp_path / "coco")) == "detection"
    assert detect_task(tmp_path / "coco") == "detection"
    assert detect_task(yolo(tmp_path / "yolo")) == "detection"
    assert detect_task(folder(tmp_path / "masks")) == "segmentation"
    assert detect_task(folder(tmp_path / "labels", masks="labels")) == "segmentation"
    assert detect_task(tree({"cat": 2, "dog": 2})) == "classification"
    assert detect_task(tree({"train/cat": 2, "train/dog": 2})) == "classification"
    (tmp_path / "labels.csv").write_text("path,label\n")
    assert detect_task(tmp_path / "labels.csv") == "classification"
    (tmp_path / "empty").mkdir()
    assert detect_task(tmp_path / "empty") is None
    assert detect_task(tmp_path / "nowhere") is None
    assert detect_task("sample:counting") is None


def test_data_of_another_task_or_no_data_are_refused(tmp_path, tree):
    with pytest.raises(GraftError, match="holds no detection data"):
        load_detection(tree({"cat": 2, "dog": 2}))
    with pytest.raises(GraftError, match="no pictures with masks"):
        load_segmentation(tree({"cat": 2, "dog": 2}))
    for load in (load_detection, load_segmentation):
        with pytest.raises(GraftError, match="no data at"):
            load(tmp_path / "nowhere")
    with pytest.raises(GraftError, match="1 readable image"):
        load_detection(coco(tmp_path / "one", images=1))


def test_a_batch_is_two_lists_also_from_loader_processes(tmp_path):
    data = load_detection(coco(tmp_path))
    images, targets = next(iter(DataLoader(data.train, 3, num_workers=1, collate_fn=collate_detection)))
    assert len(images) == len(targets) == 3
    assert targets[0]["boxes"].shape[1] == 4
    copy = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(copy[0][1]["masks"], data.train[0][1]["masks"])


def test_items_do_not_share_memory_with_the_data(tmp_path):
    data = load_detection(coco(tmp_path))
    data.train[0][1]["boxes"].zero_()
    assert data.train[0][1]["boxes"].sum() > 0


def test_the_fingerprint_follows_boxes_and_pictures(tmp_path):
    file = coco(tmp_path)
    before = load_detection(file).train.fingerprint()
    assert load_detection(file).train.fingerprint() == before
    moved = coco(tmp_path, change=lambda t: [a.update(bbox=[9, 10, 20, 15]) for a in t["annotations"]])
    assert load_detection(moved).train.fingerprint() != before


def test_a_picture_that_changed_its_size_after_loading_is_named(tmp_path):
    data = load_detection(coco(tmp_path))
    save_picture(data.train.records[0].path, size=(10, 20))
    with pytest.raises(GraftError, match="is 10x20 pixels, but was 64x48"):
        data.train[0]


def test_the_size_is_that_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == (30, 20)
    with pytest.raises(GraftError, match="cannot read the image"):
        picture_size(tmp_path / "gone.jpg")


def test_a_subset_keeps_order_and_transform(tmp_path):
    train = load_detection(coco(tmp_path)).train.with_transform(lambda image, target: ("seen", target))
    chosen = train.subset([2, 0])
    assert chosen.ids == [train.ids[2], train.ids[0]]
    assert chosen[0][0] == "seen"
