import pytest

from torchgraft.data import load_data
from torchgraft.errors import GraftError

from .conftest import cut_off, save_picture


@pytest.fixture
def table(tmp_path):
    def make(text, pictures=6, encoding="utf-8"):
        for i in range(pictures):
            save_picture(tmp_path / "img" / f"{i}.png", seed=i)
        path = tmp_path / "labels.csv"
        path.write_text(text, encoding=encoding)
        return path

    return make


def rows(*lines):
    return "\n".join(lines) + "\n"


def test_paths_are_relative_to_the_table_and_val_is_split_off(table):
    path = table(rows("path,label", *(f"img/{i}.png,{'cat' if i < 3 else 'dog'}" for i in range(6))))
    data = load_data(path)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val), data.test) == (4, 2, None)
    assert data.train.image(0).size == (64, 48)
    assert sorted(data.train.ids + data.val.ids) == [f"img/{i}.png" for i in range(6)]


def test_the_split_column_divides_and_other_columns_are_ignored(table):
    lines = ["img/0.png,9,train,x", "img/1.png,10,train,x", "img/2.png,9,Valid,x", "img/3.png,10,test,x"]
    data = load_data(table(rows("Path, Label,split,note", *lines), encoding="utf-8-sig"))
    assert data.classes == ("9", "10")
    assert (data.train.labels, data.val.labels, data.test.labels) == ([0, 1], [0], [1])


def test_missing_and_cut_off_pictures_are_skipped_or_refused(table, tmp_path):
    path = table(rows("path,label", *(f"img/{i}.png,{'ab'[i % 2]}" for i in range(8))))
    cut_off(tmp_path / "img" / "0.png")
    data = load_data(path)
    assert [s.reason for s in data.skipped][1:] == ["there is no such file"] * 2
    assert "truncated" in data.skipped[0].reason
    with pytest.raises(GraftError, match=r"0\.png"):
        load_data(path, strict=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"header \(nothing\)"),
        ("file;label\n", "header file;label"),
        ("path,class\nimg/0.png,a\n", "expected path,label"),
        ("path,label\n", "lists no images"),
        ("path,label\nimg/0.png,a\nimg/1.png,a\n", "single label, 'a'"),
        ("path,label\nimg/0.png,\n", "line 2: the label is empty"),
        ("path,label\n,a\n", "line 2: the path is empty"),
        ("path,label,split\nimg/0.png,a,trian\n", "line 2: the split is 'trian'.*'train'"),
        ("path,label,split\nimg/0.png,a,val\n", "no line whose split is train"),
        ("path,label,split\nimg/0.png,a,train\nimg/1.png,b,test\n", "label 'b' .* not in train"),
        ("path,label\nimg/0.png,a\nimg/0.png,b\n", "line 3: img/0.png is listed already in line 2"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(table, text, message):
    with pytest.raises(GraftError, match=message):
        load_data(table(text))


def test_a_label_without_a_readable_picture_is_named(table):
    with pytest.raises(GraftError, match=r"the label 'b' .* no readable image to train on.*nowhere.png"):
        load_data(table(rows("path,label", "img/0.png,a", "img/1.png,a", "nowhere.png,b")))


def test_a_val_part_without_a_readable_picture_is_refused(table):
    lines = ["img/0.png,a,train", "img/1.png,b,train", "nowhere.png,b,val"]
    with pytest.raises(GraftError, match=r"the val part of .* has no images"):
        load_data(table(rows("path,label,split", *lines)))


def test_text_that_is_not_utf8_is_refused(table):
    with pytest.raises(GraftError, match="not UTF-8"):
        load_data(table("path,label\nimg/0.png,k\xe4se\n", encoding="latin-1"))
