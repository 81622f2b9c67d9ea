from __future__ import annotations

import json

import pytest
from PIL import Image

from .conftest import one_line_error


def test_every_image_gets_its_class_and_confidence(cli, run, photos):
    spoken = cli("predict", run / "adapter", photos / "red" / "0.png", photos / "red" / "1.png")
    assert spoken.code == 0, spoken.err
    rows = spoken.out.splitlines()[1:3]
    for index, row in enumerate(rows):
        assert f"{index}.png" in row and "%" in row
        assert "red" in row or "blue [x]" in row


def test_json_lists_the_classes_of_every_image_of_a_folder_best_first(cli, run, photos):
    spoken = cli("predict", run / "adapter", photos / "red", "--top", 2, "--json")
    answers = json.loads(spoken.out)
    assert len(answers) == 10
    for answer in answers:
        (first, p), (second, q) = answer["top"]
        assert {first, second} == {"red", "blue [x]"}
        assert p >= q and p + q == pytest.approx(1, abs=1e-5)


def test_the_overlay_is_a_picture_of_all_images(cli, run, photos, tmp_path):
    out = tmp_path / "answers.png"
    spoken = cli("predict", run / "adapter", photos, "--out", out, "--json")
    assert spoken.code == 0, spoken.err
    json.loads(spoken.out)
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_an_unreadable_image_does_not_stop_the_others_but_changes_the_exit_code(cli, run, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    spoken = cli("predict", run / "adapter", broken, photos / "red" / "0.png", "--json")
    assert spoken.code == 2
    first, second = json.loads(spoken.out)
    assert first["error"] and not second["error"] and second["top"]
    assert "broken.png" in spoken.err and "Traceback" not in spoken.err


def test_an_overlay_that_is_no_png_is_refused_before_anything_is_classified(cli, run, photos, tmp_path):
    line = one_line_error(cli("predict", run / "adapter", photos / "red" / "0.png", "--out", tmp_path / "x.jpg"))
    assert "x.png" in line


def test_a_folder_without_adapter_is_one_line(cli, tmp_path, photos):
    line = one_line_error(cli("predict", tmp_path, photos / "red" / "0.png"))
    assert "adapter" in line
