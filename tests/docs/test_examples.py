"""What the documentation shows is run, and what it names exists."""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from torchgraft.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# Pages whose Python blocks, one after the other, are a whole program that needs no download.
PROGRAMS = ("CONTRIBUTING.md", "docs/concepts.md", "docs/getting-started.md", "docs/reference/errors.md")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands(group: Any, *before: str) -> Iterator[tuple[str, Any]]:
    """The verbs of a group, and those of the groups in it, by the words that call them."""
    for name, command in group.commands.items():
        yield " ".join([*before, name]), command
        if hasattr(command, "commands"):
            yield from commands(command, *before, name)


def called(words: list[str]) -> tuple[str, Any]:
    """The verb that the words of a command line call, and its name; empty when there is none."""
    names, command = [], get_command(app)
    for word in words:
        if word in getattr(command, "commands", {}):
            names, command = [*names, word], command.commands[word]  # type: ignore[attr-defined]
    return " ".join(names), command


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_python_of_a_page_runs_as_one_program(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The future import must stand first in a file, and stands in a later block of CONTRIBUTING.md.
    future = "from __future__ import annotations\n"
    text = future + "\n".join(blocks(ROOT / page, "python")).replace(future, "")
    program = tmp_path / "page.py"
    program.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # A method that a page registers is known to no other test; the library's own are registered before.
    importlib.import_module("torchgraft.methods")
    module = importlib.import_module("torchgraft.core.method")
    monkeypatch.setattr(module, "_registry", dict(module._registry))
    runpy.run_path(str(program), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_exists_with_its_options(page: Path) -> None:
    inline = re.findall(r"`(torchgraft [^`]+)`", page.read_text(encoding="utf-8"))
    shown = "\n".join([*blocks(page, "sh", "bash", "console"), *inline])
    for line in re.findall(r"(?<![\w/.-])torchgraft +(.+)", shown):
        words = line.split("#")[0].split()
        if words[0].isupper() or words[0].startswith("-") or words[0] == "...":
            continue
        verb, command = called(words)
        assert verb, f"{page.name}: there is no `torchgraft {words[0]}`"
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        unknown = [w for w in words if re.match(r"--?[a-z]", w) and w.split("=")[0] not in options]
        assert not unknown, f"{page.name}: torchgraft {verb} has no option {unknown[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_page_of_the_command_line_has_every_verb_and_option() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    for verb, command in commands(get_command(app)):
        part = page[page.index(f"## {verb}\n") :].split("\n## ")[0]
        missing = [o for p in command.params for o in p.opts if o.startswith("--") and o not in part]
        assert not missing, f"docs/reference/cli.md lacks torchgraft {verb} {missing[0]}; run `make docs`"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert pages and not [page for page in pages if page not in navigation]
