from __future__ import annotations

import json
import sys

import pytest
import torch

from .conftest import make_photos, one_line_error, train_words


def test_training_leaves_a_run_folder_with_a_report_and_names_the_next_commands(cli, photos, tmp_path):
    out = tmp_path / "run"
    spoken = cli(*train_words(photos, out))
    assert spoken.code == 0, spoken.err
    for name in ("config.yaml", "metrics.csv", "summary.json", "report.html", "adapter/adapter_config.json"):
        assert (out / name).is_file(), name
    assert "accuracy" in spoken.out
    assert f"torchgraft predict {out / 'adapter'} IMAGE..." in spoken.out
    assert f"torchgraft eval {out}" in spoken.out
    assert str(out / "report.html") in spoken.out


def test_json_is_the_only_thing_on_standard_output(cli, photos, tmp_path):
    out = tmp_path / "run"
    spoken = cli(*train_words(photos, out, "--json"))
    assert spoken.code == 0, spoken.err
    result = json.loads(spoken.out)
    assert result["out"] == str(out)
    assert 0 <= result["accuracy"] <= 1
    assert result["trainable_params"] == result["adapter_params"] + result["head_params"]
    assert "epoch 1/1" in spoken.err


def test_other_settings_go_through_o_and_win_over_the_recipe(cli, photos, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("weight_decay: 0.5\nlr: 0.25\n")
    out = tmp_path / "run"
    words = train_words(photos, out, "--recipe", recipe, "-o", "weight_decay=0.125", "-o", "augment=none")
    assert cli(*words).code == 0
    text = (out / "config.yaml").read_text()
    assert "weight_decay: 0.125" in text and "lr: 0.25" in text and "augment: none" in text


def test_memory_options_are_settings_of_the_run(cli, photos, tmp_path):
    out = tmp_path / "run"
    words = train_words(photos, out, "--lean", "off", "--frozen-dtype", "bf16", "--no-channels-last")
    spoken = cli(*words)
    assert spoken.code == 0, spoken.err
    text = (out / "config.yaml").read_text()
    assert "lean: 'off'" in text and "frozen_dtype: bf16" in text and "channels_last: false" in text
    assert "kept for the backward" in spoken.out and "(lean: off)" in spoken.out
    page = (out / "report.html").read_text()
    assert "kept for the backward of a batch" in page and "frozen part in bf16" in page


def test_a_setting_given_in_two_ways_is_refused(cli, photos, tmp_path):
    line = one_line_error(cli(*train_words(photos, tmp_path / "run", "-o", "epochs=3")))
    assert "epochs" in line and "twice" in line


@pytest.mark.parametrize(
    ("words", "given", "offered"),
    [
        (["--method", "conv-adaptor"], "conv-adaptor", "conv-adapter"),
        (["--method", "conv-adapter[reductoin=4]"], "reductoin", "reduction"),
        (["--backbone", "test_convnxt"], "test_convnxt", "test_convnext"),
        (["-o", "weight_decai=1"], "weight_decai", "weight_decay"),
        (["-o", "lr"], "'lr'", "key=value"),
        (["--recipe", "conv-adaptre"], "conv-adaptre", "conv-adapter"),
        (["-o", "schedule=cosin"], "cosin", "cosine"),
        (["--lean", "exakt"], "exakt", "exact"),
        (["--frozen-dtype", "bf61"], "bf61", "bf16"),
        (["--device", "gpu"], "gpu", "cuda"),
    ],
)
def test_a_name_that_does_not_exist_is_one_line_with_the_nearest_one(cli, photos, tmp_path, words, given, offered):
    line = one_line_error(cli(*train_words(photos, tmp_path / "run", *words)))
    assert given in line and offered in line


def test_a_wrong_key_in_a_recipe_is_one_line_with_the_nearest_one(cli, photos, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epohs: 3\n")
    line = one_line_error(cli(*train_words(photos, tmp_path / "run", "--recipe", recipe)))
    assert "epohs" in line and "epochs" in line and "mine.yaml" in line


def test_a_recipe_that_is_not_yaml_is_one_line(cli, photos, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("lr: [1\nx: }")
    assert "mine.yaml" in one_line_error(cli(*train_words(photos, tmp_path / "run", "--recipe", recipe)))


def test_a_folder_that_does_not_exist_is_one_line(cli, tmp_path):
    line = one_line_error(cli(*train_words(tmp_path / "nowhere", tmp_path / "run")))
    assert "nowhere" in line


def test_a_folder_with_one_class_is_one_line(cli, tmp_path):
    single = make_photos(tmp_path / "single", {"red": (200, 0, 0)})
    line = one_line_error(cli(*train_words(single, tmp_path / "run")))
    assert "class" in line


def test_unreadable_images_stop_a_strict_run_in_one_line(cli, tmp_path):
    folder = make_photos(tmp_path / "photos", {"red": (200, 0, 0), "blue": (0, 0, 200)})
    (folder / "red" / "broken.png").write_bytes(b"not a picture")
    line = one_line_error(cli(*train_words(folder, tmp_path / "run", "--strict")))
    assert "broken.png" in line


def test_an_existing_run_is_never_overwritten_unasked(cli, photos, run):
    before = (run / "config.yaml").read_bytes()
    line = one_line_error(cli(*train_words(photos, run)))
    assert str(run) in line and "overwrite" in line
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none_is_one_line(cli, photos, tmp_path):
    line = one_line_error(cli(*train_words(photos, tmp_path / "run", "--device", "cuda")))
    assert "cuda" in line.lower()


def test_an_interrupt_says_with_which_command_to_go_on(cli, photos, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchgraft.tasks.train", interrupted)
    monkeypatch.chdir(tmp_path)
    words = ["train", str(photos), "--backbone", "test_convnext", "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["torchgraft", *words])
    spoken = cli(*words)
    assert spoken.code == 130
    last = spoken.err.splitlines()[-1]
    assert last.startswith("interrupted; continue with: torchgraft train ")
    assert last.endswith("--resume") and "--out runs/" in last and "--overwrite" not in last


def test_resuming_a_finished_run_repeats_its_result(cli, photos, run):
    spoken = cli(*train_words(photos, run, "--resume", "--json"))
    assert spoken.code == 0, spoken.err
    assert json.loads(spoken.out) == json.loads((run / "summary.json").read_text())
