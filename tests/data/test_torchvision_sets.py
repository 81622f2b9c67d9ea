import inspect
import urllib.error

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from torchgraft.data import load_data, torchvision_sets
from torchgraft.data.torchvision_sets import SETS
from torchgraft.errors import GraftError


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHGRAFT_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("urllib.request.urlopen", refuse)


class Memory:
    """A data set in memory with torchvision's manners."""

    def __init__(self, answers, **attributes):
        self.pixels = np.stack([np.full((8, 8, 3), k, np.uint8) for k in answers])
        self.kept = answers
        vars(self).update(attributes)

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels[index]), self.kept[index]


def test_fake_data_takes_its_constructors_options():
    data = load_data("tv:FakeData?size=30&num_classes=3&image_size=(3,16,20)")
    assert data.classes == ("0", "1", "2")
    assert len(data.train) + len(data.val) == 30
    assert data.test is None
    picture, label = data.train[0]
    assert (picture.size, label) == ((20, 16), data.train.labels[0])


def test_every_listed_name_exists_and_takes_the_split_words_it_is_given():
    for name, words in SETS.items():
        build = getattr(torchvision.datasets, name)
        accepted = torchvision_sets._parameters(build)
        assert ("split" in accepted) == bool(words) or name == "EMNIST", name
        if words and name != "ImageNet":
            source = inspect.getsource(inspect.getmodule(build))
            assert all(f'"{word}"' in source for word in words.values()), name


@pytest.mark.parametrize(
    "name, attributes",
    [
        ("CIFAR10", {"targets": [0, 1, 1, 0], "classes": ["plane", "car"]}),
        ("SVHN", {"labels": np.array([0, 1, 1, 0])}),
        ("Food101", {"_labels": [0, 1, 1, 0], "classes": ["soup", "salad"]}),
        ("GTSRB", {"_samples": [("a.ppm", 0), ("b.ppm", 1), ("c.ppm", 1), ("d.ppm", 0)]}),
        ("USPS", {}),
    ],
)
def test_labels_are_found_wherever_the_data_set_keeps_them(name, attributes, monkeypatch):
    made = []

    def build(root, train=None, split=None, download=False):
        made.append((train, split))
        return Memory([0, 1, 1, 0], **attributes)

    real = torchvision_sets._parameters(getattr(torchvision.datasets, name))
    monkeypatch.setattr(torchvision.datasets, name, build)
    monkeypatch.setattr(torchvision_sets, "_parameters", lambda b: real)
    data = load_data(f"tv:{name}", val_fraction=0.5)
    assert made == ([(None, "train"), (None, "test")] if SETS[name] else [(True, None), (False, None)])
    assert data.test.labels == [0, 1, 1, 0]
    assert data.classes == tuple(attributes.get("classes", ("0", "1")))
    assert data.mirror == (name in ("CIFAR10", "Food101"))
    assert data.test.image(1).getpixel((0, 0)) == (1, 1, 1)


def test_a_wrong_name_offers_the_nearest():
    with pytest.raises(GraftError, match=r"tv:CIFAR11: .*'CIFAR10'"):
        load_data("tv:CIFAR11")


def test_a_wrong_option_offers_the_nearest():
    with pytest.raises(GraftError, match=r"tv:FakeData has no option 'classes'; .*num_classes"):
        load_data("tv:FakeData?classes=3")


def test_a_wrong_value_is_reported_in_one_line():
    with pytest.raises(GraftError, match=r"tv:FGVCAircraft: .*annotation_level") as caught:
        load_data("tv:FGVCAircraft?annotation_level=wing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["CIFAR10", "OxfordIIITPet", "Flowers102"])
def test_without_a_network_the_error_says_where_the_files_belong(name, no_network, data_folder):
    with pytest.raises(GraftError) as caught:
        load_data(f"tv:{name}")
    message = str(caught.value)
    assert "Name or service not known" in message
    assert str(data_folder) in message
    assert "\n" not in message


def test_a_data_set_that_cannot_be_downloaded_at_all_says_where_its_files_belong(data_folder):
    with pytest.raises(GraftError, match=f"cannot be downloaded automatically.*{data_folder}"):
        load_data("tv:FER2013")
