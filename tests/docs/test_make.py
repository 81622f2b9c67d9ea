"""The Makefile, without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("demo", "test", "lint", "bench", "docs", "clean")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the two files that decide what is installed."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make in a folder."""
    # The suite may itself have been started by make, whose variables would reach this one.
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    command = ["make", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=outer)


def test_make_alone_lists_every_target(checkout: Path) -> None:
    shown = make(checkout).stdout
    for target in TARGETS:
        assert re.search(rf"^  make {target} +\w", shown, re.MULTILINE), target
    assert not (checkout / ".venv").exists()


def test_an_interpreter_that_is_too_old_is_named_in_one_line(checkout: Path) -> None:
    old = checkout / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.9 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done = make(checkout, "test", f"PYTHON={old}")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(lines) == 1 and "Python 3.11 or newer" in lines[0] and "python3.9 (3.9)" in lines[0]
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(("target", "stamp"), [("demo", ".demo"), ("test", ".dev"), ("docs", ".docs")])
def test_nothing_is_installed_when_the_stamp_is_newer_than_pyproject(checkout: Path, target: str, stamp: str) -> None:
    assert "pip install" in make(checkout, "-n", target).stdout
    interpreter = checkout / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    for path in (interpreter, checkout / ".venv" / stamp):
        path.touch()
    assert "pip install" not in make(checkout, "-n", target).stdout
    os.utime(checkout / "pyproject.toml", (2**31, 2**31))
    assert "pip install" in make(checkout, "-n", target).stdout


def test_a_failed_install_leaves_no_stamp(checkout: Path) -> None:
    interpreter = checkout / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text('#!/bin/sh\ncase "$*" in *install*) exit 1 ;; esac\n')
    interpreter.chmod(0o755)
    assert make(checkout, "test").returncode != 0
    assert not (checkout / ".venv" / ".dev").exists()


def test_the_wheels_of_the_demo_are_those_of_pyproject_and_come_without_dependencies(checkout: Path) -> None:
    interpreter = checkout / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$*" >> calls\n')
    interpreter.chmod(0o755)
    make(checkout, "demo")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [line for line in (checkout / "calls").read_text().splitlines() if "--no-deps" in line]
    assert len(installs) == 1
    assert installs[0].split("--no-deps ")[1].split() == extras["demo"]
    assert (checkout / ".venv" / ".demo").exists()


def test_no_package_registry_is_named() -> None:
    hosts = re.compile(r"pypi\.org|pythonhosted|--(extra-)?index-url|download\.pytorch\.org")
    for name in ("Makefile", "pyproject.toml", ".ci/run"):
        assert not hosts.search((ROOT / name).read_text()), name
