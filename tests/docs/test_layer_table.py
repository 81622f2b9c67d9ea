"""The page of layer kinds says what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

from torchgraft.core.placements import PLACEMENTS

SCRIPT = Path(__file__).parents[2] / "docs" / "scripts" / "layer_table.py"


def test_the_committed_page_is_up_to_date() -> None:
    script = runpy.run_path(str(SCRIPT))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), f"run `python {SCRIPT.name}` again"


def test_every_cell_of_the_table_has_an_answer_and_every_refusal_a_reason() -> None:
    script = runpy.run_path(str(SCRIPT))
    text = script["page"]()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(script["LAYERS"])
    reasons = text.partition("## Reasons")[2].strip().splitlines()
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
        assert len(cells) == len(PLACEMENTS)
        for cell in cells:
            if cell != "merges":
                number = int(cell.partition("(")[2].rstrip(")"))
                assert len(reasons[number - 1]) > len(f"{number}. a reason")


def test_running_the_script_writes_the_page(tmp_path: Path, monkeypatch) -> None:
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["main"].__globals__, "PAGE", tmp_path / "page.md")
    script["main"]()
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == script["page"]()
