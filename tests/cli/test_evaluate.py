from __future__ import annotations

import json
import shutil

import pytest

from .conftest import make_photos, one_line_error


@pytest.mark.parametrize("inner", ["", "adapter"])
def test_a_run_and_its_adapter_give_the_scores_of_the_training(cli, run, photos, inner):
    spoken = cli("eval", run / inner, photos, "--json")
    assert spoken.code == 0, spoken.err
    scores = json.loads(spoken.out)
    trained = json.loads((run / "summary.json").read_text())
    assert scores["confusion"] == trained["confusion"]
    assert scores["loss"] == pytest.approx(trained["loss"], abs=1e-5)


def test_people_see_accuracy_and_every_class(cli, run, photos):
    spoken = cli("eval", run, photos)
    assert spoken.code == 0, spoken.err
    assert "accuracy" in spoken.out and "red" in spoken.out and "blue [x]" in spoken.out


def test_data_with_other_classes_is_one_line(cli, run, tmp_path):
    other = make_photos(tmp_path / "other", {"green": (0, 200, 0), "red": (200, 0, 0)})
    assert "green" in one_line_error(cli("eval", run, other))


def test_an_unknown_part_is_one_line(cli, run, photos):
    assert "tset" in one_line_error(cli("eval", run, photos, "--part", "tset"))


def test_truncated_weights_are_one_line(cli, run, photos, tmp_path):
    copy = shutil.copytree(run / "adapter", tmp_path / "adapter")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "adapter_model.safetensors" in one_line_error(cli("eval", copy, photos))


@pytest.mark.parametrize("name", ["adapter_config.json", "task.json"])
def test_truncated_json_is_one_line(cli, run, photos, tmp_path, name):
    copy = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (copy / name).write_text((copy / name).read_text()[:40])
    assert name in one_line_error(cli("eval", copy, photos))


def test_an_adapter_of_another_backbone_is_one_line_that_names_both(cli, run, photos, tmp_path):
    copy = shutil.copytree(run / "adapter", tmp_path / "adapter")
    task = json.loads((copy / "task.json").read_text())
    task["backbone"]["name"] = "test_convnext2"
    (copy / "task.json").write_text(json.dumps(task))
    line = one_line_error(cli("eval", copy, photos))
    assert "test_convnext2" in line and "test_convnext" in line.replace("test_convnext2", "")
