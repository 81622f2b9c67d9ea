import importlib.machinery
import sys
import types

import pytest
from PIL import Image

from torchgraft.data import load_data
from torchgraft.errors import GraftError


class Table(list):
    """Rows with the column access and the features of ``datasets.Dataset``."""

    def __init__(self, labels, features):
        super().__init__({"picture": Image.new("L", (4, 4), 10 * k), "kind": k} for k in labels)
        self.features = features

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture
def hub(monkeypatch):
    """Stands for the package ``datasets``, which is optional."""
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.Image = type("Image", (), {})
    module.ClassLabel = type("ClassLabel", (), {"names": ["tea", "coffee"]})
    module.tables = {}

    def load_dataset(repo):
        if repo not in module.tables:
            raise FileNotFoundError(f"no data set {repo}")
        return module.tables[repo]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_columns_are_recognised_by_their_types(hub):
    features = {"note": object(), "picture": hub.Image(), "kind": hub.ClassLabel()}
    hub.tables["me/cups"] = {
        "train": Table([0, 1] * 5, features),
        "validation": Table([1, 0], features),
        "extra": Table([0], features),
    }
    data = load_data("hf:me/cups")
    assert data.classes == ("tea", "coffee")
    assert (len(data.train), data.val.labels, data.test) == (10, [1, 0], None)
    assert data.val.image(0).getpixel((0, 0)) == (10, 10, 10)


def test_what_the_hub_cannot_give_is_explained(hub):
    with pytest.raises(GraftError, match="hf:me/nothing cannot be loaded: no data set me/nothing"):
        load_data("hf:me/nothing")
    hub.tables["me/text"] = {"train": Table([0], {"kind": hub.ClassLabel()})}
    with pytest.raises(GraftError, match="no column of type Image; its columns are kind"):
        load_data("hf:me/text")
    hub.tables["me/test"] = {"test": Table([0], {"picture": hub.Image(), "kind": hub.ClassLabel()})}
    with pytest.raises(GraftError, match="no train split; its splits are test"):
        load_data("hf:me/test")


def test_without_the_package_the_error_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GraftError, match="run: pip install datasets"):
        load_data("hf:me/cups")
