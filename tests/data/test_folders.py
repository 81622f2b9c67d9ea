import os

import pytest

from torchgraft.data import load_data
from torchgraft.errors import GraftError

from .conftest import cut_off, save_picture


def everything(data):
    return sorted(data.train.ids + data.val.ids + (data.test.ids if data.test else []))


def test_a_plain_tree_becomes_train_and_a_stratified_val(tree):
    root = tree({"cat": 10, "dog": 20})
    data = load_data(str(root))
    assert data.classes == ("cat", "dog")
    assert [data.val.labels.count(k) for k in (0, 1)] == [2, 4]
    assert [data.train.labels.count(k) for k in (0, 1)] == [8, 16]
    assert data.test is None
    assert len(set(everything(data))) == 30
    assert all(i.split("/")[0] == data.classes[k] for i, k in zip(data.val.ids, data.val.labels, strict=True))


def test_the_val_part_moves_with_the_seed_and_with_nothing_else(tree):
    root = tree({"cat": 10, "dog": 10})
    first = load_data(root, seed=1)
    assert load_data(root, seed=1).val.ids == first.val.ids
    assert load_data(root, seed=2).val.ids != first.val.ids


@pytest.mark.parametrize("val_name", ["val", "valid", "validation", "Val"])
def test_part_folders_are_taken_as_they_are_named(tree, val_name):
    root = tree({f"{p}/{c}": n for p, n in (("train", 4), (val_name, 2), ("test", 3)) for c in ("cat", "dog")})
    data = load_data(root)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)
    assert data.test.ids[0].startswith("test/cat/")


def test_train_and_test_folders_leave_test_alone_and_split_val_off_train(tree):
    root = tree({f"{p}/{c}": 5 for p in ("train", "test") for c in ("cat", "dog")})
    data = load_data(root)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 10)
    assert all(i.startswith("train/") for i in data.train.ids + data.val.ids)


def test_classes_are_numbered_in_natural_order(tree):
    data = load_data(tree({"type10": 2, "type9": 2, "Type1": 2}))
    assert data.classes == ("Type1", "type9", "type10")


def test_pictures_are_found_at_any_depth_and_other_files_are_ignored(tree):
    root = tree({"cat/monday/raw": 3, "dog": 3})
    (root / "cat" / "notes.txt").write_text("not a picture")
    (root / "cat" / "._img0.jpg").write_bytes(b"left by a file manager")
    (root / ".thumbnails").mkdir()
    (root / "README.md").write_text("about")
    data = load_data(root)
    assert data.classes == ("cat", "dog")
    assert len(everything(data)) == 6
    assert data.skipped == ()


def test_links_are_followed_and_a_loop_of_links_ends(tree):
    root = tree({"cat": 3, "dog": 3})
    (root / "cat" / "again").symlink_to(root / "cat", target_is_directory=True)
    assert len(everything(load_data(root))) == 6


def test_the_selection_does_not_depend_on_the_order_of_the_file_system(tree, monkeypatch):
    root = tree({"cat": 12, "dog": 12})
    expected = load_data(root, seed=3, shots=2)
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda *a, **k: ((where, dirs, files[::-1]) for where, dirs, files in walk(*a, **k))
    )
    shuffled = load_data(root, seed=3, shots=2)
    assert (shuffled.train.ids, shuffled.val.ids) == (expected.train.ids, expected.val.ids)


def test_unreadable_pictures_are_left_out_and_listed_with_the_reason(tree):
    root = tree({"cat": 6, "dog": 6})
    cut_off(root / "cat" / "img0.jpg")
    cut_off(root / "cat" / "img1.png")
    (root / "dog" / "img2.jpg").write_bytes(b"")
    (root / "dog" / "img3.png").write_text("a text file with the wrong name")
    data = load_data(root)
    assert [os.path.relpath(s.path, root) for s in data.skipped] == [
        "cat/img0.jpg",
        "cat/img1.png",
        "dog/img2.jpg",
        "dog/img3.png",
    ]
    assert "truncated" in data.skipped[0].reason
    assert "not a picture" in data.skipped[3].reason
    assert len(everything(data)) == 8


def test_strict_refuses_the_first_unreadable_picture_by_name(tree):
    root = tree({"cat": 6, "dog": 6})
    cut_off(root / "cat" / "img4.jpg")
    with pytest.raises(GraftError, match=r"img4\.jpg.*truncated"):
        load_data(root, strict=True)


def test_a_class_whose_pictures_are_all_unreadable_is_named(tree):
    root = tree({"cat": 2, "dog": 2})
    for f in (root / "cat").iterdir():
        f.write_bytes(b"")
    with pytest.raises(GraftError, match=r"class folder 'cat'.*no readable image"):
        load_data(root)


def test_a_tree_without_any_readable_picture_is_refused(tree):
    root = tree({"cat": 1, "dog": 1})
    for f in root.rglob("*.jpg"):
        f.write_bytes(b"x")
    with pytest.raises(GraftError, match="none of the 2 images"):
        load_data(root)


@pytest.mark.parametrize("folders", [{"cat": 3, "dog": 0}, {"train/cat": 3, "train/dog": 0}])
def test_an_empty_class_folder_is_named(tree, folders):
    with pytest.raises(GraftError, match=r"class folder \S+dog holds no images"):
        load_data(tree(folders))


@pytest.mark.parametrize("folders", [{"cat": 3}, {"train/cat": 3, "val/cat": 3}])
def test_a_single_class_is_refused(tree, folders):
    with pytest.raises(GraftError, match="single class folder, 'cat'"):
        load_data(tree(folders))


def test_a_tree_without_class_folders_is_refused(tmp_path):
    save_picture(tmp_path / "photo.jpg")
    with pytest.raises(GraftError, match=r"no class folders; expected .*CLASS/IMAGES"):
        load_data(tmp_path)


def test_an_empty_train_folder_is_refused(tree):
    with pytest.raises(GraftError, match="train has no class folders"):
        load_data(tree({"train": 0, "val/cat": 1}))


def test_part_folders_without_train_are_refused(tree):
    with pytest.raises(GraftError, match="test and val but no train folder"):
        load_data(tree({"val/cat": 1, "test/cat": 1}))


def test_two_names_for_the_same_part_are_refused(tree):
    with pytest.raises(GraftError, match="two val folders"):
        load_data(tree({"train/cat": 1, "val/cat": 1, "valid/cat": 1}))


def test_a_class_that_only_test_has_is_named(tree):
    with pytest.raises(GraftError, match=r"test/emu is a class that the train folder does not have"):
        load_data(tree({"train/cat": 2, "train/dog": 2, "test/emu": 1}))


def test_a_class_with_one_picture_cannot_be_split(tree):
    with pytest.raises(GraftError, match="class 'dog' has 1 training image"):
        load_data(tree({"cat": 4, "dog": 1}))


def test_a_folder_that_may_not_be_read_is_refused(tree, monkeypatch):
    root = tree({"cat": 2, "dog": 2})
    scandir = os.scandir

    def forbid(path="."):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(GraftError, match=r"cannot read the folder .*dog: Permission denied"):
        load_data(root)
