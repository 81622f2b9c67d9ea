import pytest

from torchgraft.data.dense import load_detection
from torchgraft.errors import GraftError

from .conftest import save_picture


def yolo(root, lines="0 0.5 0.5 0.25 0.5\n", *, part="", count=4, classes="cat\ndog\n"):
    for i in range(count):
        save_picture(root / "images" / part / f"p{i}.png", seed=i)
        label = root / "labels" / part / f"p{i}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(lines if i == 0 else "1 0.5 0.5 0.5 0.5\n")
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root


def target_of(data, name):
    return next(p[i][1] for p in (data.train, data.val) for i, r in enumerate(p.records) if r.path.name == name)


def test_shares_become_pixels_and_class_k_becomes_label_k_plus_1(tmp_path):
    data = load_detection(yolo(tmp_path))
    assert data.classes == ("cat", "dog") and data.category_ids == (0, 1)
    target = target_of(data, "p0.png")
    assert target["boxes"].tolist() == [[24, 12, 40, 36]]
    assert target["labels"].tolist() == [1]
    assert target["area"].tolist() == [16 * 24]
    assert "masks" not in target


def test_plain_images_are_split_and_part_folders_are_kept(tmp_path):
    data = load_detection(yolo(tmp_path / "a", count=10))
    assert (len(data.train), len(data.val), data.test) == (8, 2, None)
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        yolo(tmp_path / "b", part=part, count=count)
    data = load_detection(tmp_path / "b")
    assert (len(data.train), len(data.val), len(data.test)) == (4, 2, 3)


@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}"])
def test_a_yaml_names_classes_and_parts(tmp_path, names):
    for part in ("train", "valid"):
        yolo(tmp_path / part, classes=None)
    (tmp_path / "data.yaml").write_text(f"names: {names}\nnc: 2\ntrain: ../train/images\nval: valid/images\n")
    for path in (tmp_path, tmp_path / "data.yaml"):
        data = load_detection(path)
        assert data.classes == ("cat", "dog")
        assert (len(data.train), len(data.val)) == (4, 4)


def test_a_text_file_can_list_the_pictures_of_a_part(tmp_path):
    yolo(tmp_path, classes=None)
    (tmp_path / "train.txt").write_text("./images/p0.png\nimages/p1.png\n")
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: train.txt\nval: images\n")
    assert len(load_detection(tmp_path).train) == 2


def test_outlines_become_boxes_and_masks(tmp_path):
    yolo(tmp_path, "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n", count=4)
    for i in range(1, 4):
        (tmp_path / "labels" / f"p{i}.txt").write_text("")
    data = load_detection(tmp_path, seed=1, val_fraction=0.25)
    assert data.has_masks
    target = target_of(data, "p0.png")
    assert target["boxes"].tolist() == [[16, 12, 48, 36]]
    assert target["masks"].sum() == 32 * 24 == target["area"].item()
    assert target_of(data, "p1.png")["masks"].shape == (0, 48, 64)
    assert not load_detection(tmp_path, masks=False).has_masks


def test_outlines_beside_boxes_are_used_as_boxes(tmp_path):
    data = load_detection(yolo(tmp_path, "0 0.25 0.25 0.75 0.25 0.75 0.75\n"))
    assert not data.has_masks
    with pytest.raises(GraftError, match="not an outline for every object"):
        load_detection(tmp_path, masks=True)


def test_pictures_without_a_label_file_count_as_empty_with_a_warning(tmp_path):
    yolo(tmp_path)
    (tmp_path / "labels" / "p2.txt").unlink()
    with pytest.warns(UserWarning, match="1 of 4 images have no label file"):
        data = load_detection(tmp_path)
    assert target_of(data, "p2.png")["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0 0.5 0.5 0.2\n", "p0.txt line 1 has 4 values"),
        ("0 0.5 0.5 0.2 0.2\n\n1 0.5 0.5 0.2 0.2 0.9\n", "p0.txt line 3 has 6 values"),
        ("2 0.5 0.5 0.2 0.2\n", "p0.txt line 1: there is no class 2; the 2 classes"),
        ("0.5 0.5 0.5 0.2 0.2\n", "there is no class 0.5"),
        ("0 32 24 10 10\n", "p0.txt line 1: .* outside 0..1; they are shares"),
        ("0 -0.2 0.5 0.1 0.1\n", "outside 0..1"),
        ("0 a 0.5 0.1 0.1\n", "p0.txt line 1 holds something that is no number"),
        ("0 nan 0.5 0.1 0.1\n", "p0.txt line 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, lines, message):
    yolo(tmp_path, lines)
    with pytest.raises(GraftError, match=message) as caught:
        load_detection(tmp_path)
    assert "\n" not in str(caught.value)


def test_boxes_over_the_border_are_clipped_and_flat_ones_dropped_with_counts(tmp_path):
    yolo(tmp_path, "0 0.95 0.5 0.5 0.5\n0 0.5 0.5 0 0.5\n")
    with pytest.warns(UserWarning, match=r"1 boxes clipped .* 1 boxes without area dropped.*p0.txt line 1"):
        data = load_detection(tmp_path)
    assert target_of(data, "p0.png")["boxes"][0, 2] == 64


def test_missing_names_pictures_and_labels_are_said(tmp_path):
    with pytest.raises(GraftError, match="does not name its classes"):
        load_detection(yolo(tmp_path / "a", classes=None))
    root = yolo(tmp_path / "b")
    (root / "images" / "p1.png").unlink()
    with pytest.raises(GraftError, match=r"p1.txt has no image"):
        load_detection(root)
    root = yolo(tmp_path / "c", "", count=1)
    with pytest.raises(GraftError, match=r"train part .* has no box in 1 images"):
        load_detection(root)
    root = yolo(tmp_path / "d", classes="cat\ncat\n")
    with pytest.raises(GraftError, match="class name twice"):
        load_detection(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat]\ntrain: nowhere\n", "train is nowhere, which is not there"),
        ("names: [cat]\nnc: 3\ntrain: images\n", "nc is 3, but there are 1 names"),
        ("train: images\n", "expected the keys names and train"),
        ("names: {1: cat}\ntrain: images\n", "must be numbered 0 to 0"),
        ("names: [", "cannot read"),
    ],
)
def test_a_wrong_yaml_is_refused(tmp_path, text, message):
    yolo(tmp_path, classes=None)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(GraftError, match=message):
        load_detection(tmp_path)
