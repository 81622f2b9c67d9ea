import pickle

import pytest

from torchgraft.data import load_data
from torchgraft.errors import GraftError

from .conftest import save_picture


def test_a_path_that_does_not_exist_offers_its_neighbour(tree):
    root = tree({"cat": 2, "dog": 2})
    with pytest.raises(GraftError, match=r"no data at .*photo'.*did you mean '.*photos'") as caught:
        load_data(root.parent / "photo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["animals", "samples:animals"])
def test_a_spec_that_means_a_sample_offers_the_sample(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraftError, match="'sample:animals'"):
        load_data(spec)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(GraftError, match="only CSV files"):
        load_data(save_picture(tmp_path / "photo.png"))


def test_shots_narrow_train_and_leave_val_and_test_whole(tree):
    root = tree({f"{p}/{c}": n for p, n in (("train", 9), ("val", 3), ("test", 2)) for c in ("cat", "dog")})
    data = load_data(root, shots=4)
    assert [data.train.labels.count(k) for k in (0, 1)] == [4, 4]
    assert (len(data.val), len(data.test)) == (6, 4)


def test_more_shots_than_pictures_name_the_class_and_the_count(tree):
    root = tree({"train/cat": 9, "train/dog": 3, "val/cat": 1})
    with pytest.raises(GraftError, match="class 'dog' has 3 training images, fewer than shots=4"):
        load_data(root, shots=4)


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5])
def test_a_val_fraction_outside_zero_and_one_is_refused(tree, value):
    with pytest.raises(GraftError, match="val_fraction"):
        load_data(tree({"cat": 4, "dog": 4}), val_fraction=value)


def test_a_negative_seed_is_refused(tree):
    with pytest.raises(GraftError, match="seed=-1"):
        load_data(tree({"cat": 4, "dog": 4}), seed=-1)


def test_progress_reaches_the_number_of_files(tree):
    calls = []
    load_data(tree({"cat": 40, "dog": 30}), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (70, 70)
    assert calls == sorted(calls)


def test_loaded_data_can_be_sent_to_another_process(tree):
    data = pickle.loads(pickle.dumps(load_data(tree({"cat": 3, "dog": 3}))))
    assert data.train.image(0).mode == "RGB"
