"""Doing something right after another package has been imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchgraft.when_imported import when_imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that can be imported and has not been."""
    folder = tmp_path / "late_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "late_package"
    sys.modules.pop("late_package", None)


def test_it_happens_once_and_after_the_code_of_the_package(package):
    seen = []
    finders = list(sys.meta_path)
    when_imported(package, lambda: seen.append(sys.modules[package].VALUE))
    assert not seen
    module = __import__(package)
    __import__(package)
    assert seen == [3]
    assert sys.meta_path == finders
    assert "exec_module" not in vars(module.__spec__.loader)


def test_a_package_that_is_there_already_is_not_waited_for():
    seen = []
    when_imported("sys", lambda: seen.append(1))
    assert seen == [1]


def test_a_package_that_does_not_exist_stays_unknown(package):
    finders = list(sys.meta_path)
    when_imported("no_such_package_at_all", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_package_at_all")
    sys.meta_path[:] = finders


@pytest.mark.parametrize(
    "order",
    [
        "import torchgraft, timm",
        "import timm, torchgraft",
        "import torchgraft.lean.install, timm",
        "import torchgraft.backbones.revcol, timm",
    ],
)
def test_importing_torchgraft_makes_its_backbones_known_to_timm(order):
    code = f"{order}\nassert timm.is_model('revcol_tiny') and timm.is_model('resnet50')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
