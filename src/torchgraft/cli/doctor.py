"""``torchgraft doctor``: is everything in place, and if not, what to do."""

from __future__ import annotations

import dataclasses

import typer

from .console import emit_json, next_command, results_only, say, table
from .options import AsJson

EXAMPLES = """\
torchgraft doctor
torchgraft doctor --json > environment.json      attach this to a bug report"""


def run(as_json: AsJson = False) -> None:
    """Check that everything is in place.

    Versions, devices, compilers, threads, memory, assets and optional packages, each with what to do. The
    exit code is 2 if something that is required is broken.
    """
    from ..doctor import examine

    with results_only(as_json):
        findings = examine()
    broken = [f for f in findings if f.state == "broken"]
    if as_json:
        emit_json({"ok": not broken, "findings": [dataclasses.asdict(f) for f in findings]})
    else:
        marks = {"ok": "ok", "absent": "-", "broken": "BROKEN"}
        rows = ((marks[f.state], f.name, f.detail, f.advice) for f in findings)
        table(("", "what", "found", "what to do"), rows)
        say()
        say(f"{len(broken)} thing(s) to repair" if broken else "everything that is required works")
        if not broken:
            next_command("See it work:", "torchgraft demo")
    if broken:
        raise typer.Exit(2)
