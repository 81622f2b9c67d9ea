from __future__ import annotations

import json

from torchgraft.cli import console


def test_json_keeps_to_the_standard_where_python_does_not(capsys):
    console.emit_json({"loss": float("nan"), "rate": float("inf"), "classes": ("é", 1), 3: None})
    text = capsys.readouterr().out
    assert json.loads(text) == {"loss": None, "rate": None, "classes": ["é", 1], "3": None}
    assert "NaN" not in text and "Infinity" not in text


def test_a_wide_table_stays_on_one_line_a_row_away_from_a_terminal(capsys):
    console.table(("name", "value"), [("x" * 300, "y" * 300), ("short", None)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["x" * 300, "y" * 300]
    assert lines[2] == "short"


def test_columns_of_wide_characters_and_numbers_line_up(capsys):
    console.table(("class", "images", "note"), [("猫", 5, "a"), ("dog", 1000, "b")], right=("images",))
    assert capsys.readouterr().out == "class  images  note\n猫          5  a\ndog      1000  b\n"


def test_brackets_and_colons_in_names_are_text_and_not_markup(capsys):
    console.say("conv-adapter[reduction=4] :cat: [red]no[/red]")
    console.table(("class",), [("[bold]x[/bold] :dog:",)])
    console.pairs([("method", "a[b=1]")])
    out = capsys.readouterr().out
    assert "conv-adapter[reduction=4] :cat: [red]no[/red]" in out
    assert "[bold]x[/bold] :dog:" in out
    assert "a[b=1]" in out


def test_while_only_results_may_be_printed_other_output_goes_to_the_error_stream(capsys):
    with console.results_only(True):
        print("chatter")
    console.emit_json([1])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [1]
    assert captured.err == "chatter\n"
