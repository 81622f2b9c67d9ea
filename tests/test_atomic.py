"""Files that are either the old ones or the new ones."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from torchgraft.atomic import replacing, write_files, write_text
from torchgraft.errors import GraftError


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_text_is_written_into_folders_that_do_not_exist_yet(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "note.txt"
    write_text(target, "größer\n")
    assert target.read_bytes() == "größer\n".encode()
    assert _names(target.parent) == {"note.txt"}


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "note.txt"
    target.write_text("old")
    with replacing(target) as path:
        path.write_text("new, first half")
        assert target.read_text() == "old"
        assert path.parent == target.parent  # a rename within one file system
        path.write_text("new")
    assert target.read_text() == "new"
    assert _names(tmp_path) == {"note.txt"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a bug"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "note.txt"
    target.write_text("old")
    wanted = GraftError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted) as raised, replacing(target) as path:
        path.write_text("half of the ne")
        raise error
    if isinstance(error, OSError):
        assert "note.txt" in str(raised.value)
        assert "No space left on device" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert target.read_text() == "old"
    assert _names(tmp_path) == {"note.txt"}


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "note.txt"
    target.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(GraftError, match="Input/output error"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert _names(tmp_path) == {"note.txt"}


def test_the_content_is_on_the_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("sync"), sync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (steps.append("rename"), rename(self, to))[1])
    write_text(tmp_path / "note.txt", "new")
    assert steps[:2] == ["sync", "rename"]


def test_a_folder_that_cannot_be_made_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GraftError, match=r"cannot write .*note\.txt") as raised:
        write_text(tmp_path / "file" / "note.txt", "new")
    assert "\n" not in str(raised.value)


def test_several_files_are_replaced_together(tmp_path: Path) -> None:
    write_files(tmp_path / "out", {"a": lambda p: p.write_text("a"), "b": lambda p: p.write_text("b")})
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"a": "a", "b": "b"}


@pytest.mark.parametrize("failing", ["a", "b", "c"])
def test_none_of_several_files_is_replaced_when_one_cannot_be_written(tmp_path: Path, failing: str) -> None:
    for name in "abc":
        (tmp_path / name).write_text("old")

    def write(name: str, path: Path) -> None:
        path.write_text("new")
        if name == failing:
            raise OSError(28, "No space left on device")

    with pytest.raises(GraftError, match="No space left"):
        write_files(tmp_path, {n: (lambda p, n=n: write(n, p)) for n in "abc"})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys("abc", "old")


def test_a_written_file_has_the_permissions_that_an_ordinary_one_would_have(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "new")
    (tmp_path / "plain").touch()
    mode = lambda name: stat.S_IMODE((tmp_path / name).stat().st_mode)  # noqa: E731
    assert mode("note.txt") == mode("plain")
