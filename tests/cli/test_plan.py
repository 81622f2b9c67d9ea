from __future__ import annotations

import json

from .conftest import BACKBONE, one_line_error


def test_the_plan_counts_what_training_will_train(cli, run):
    spoken = cli("plan", BACKBONE, "--method", "conv-adapter", "--image-size", 32, "--num-classes", 2, "--json")
    assert spoken.code == 0, spoken.err
    trained = json.loads((run / "summary.json").read_text())
    numbers = {value for value in json.loads(spoken.out).values() if isinstance(value, int)}
    assert trained["adapter_params"] in numbers


def test_people_get_a_table_and_the_command_to_train(cli):
    spoken = cli("plan", BACKBONE, "--method", "conv-adapter[reduction=2]", "--image-size", 32)
    assert spoken.code == 0, spoken.err
    assert "stages[0].blocks[0]" in spoken.out
    assert f"torchgraft train FOLDER --backbone {BACKBONE} --method 'conv-adapter[reduction=2]'" in spoken.out


def test_memory_is_foretold_by_level_and_batch(cli):
    words = ["plan", BACKBONE, "--image-size", 32, "--lean", "checkpoint"]
    one, four = (json.loads(cli(*words, "--batch", n, "--json").out) for n in (1, 4))
    assert one["saved"].keys() == {"off", "exact", "recompute", "checkpoint", "compact"}
    assert one["saved_bytes"] == one["saved"]["checkpoint"] < one["saved"]["off"] < one["saved_full"]
    assert 3 < four["saved"]["off"] / one["saved"]["off"] < 4.1
    spoken = cli(*words, "--batch", 4)
    assert "batch of 4" in spoken.out and "(lean checkpoint)" in spoken.out and "--lean checkpoint" in spoken.out


def test_an_unknown_level_is_one_line(cli):
    assert "exact" in one_line_error(cli("plan", BACKBONE, "--lean", "exakt"))


def test_an_unknown_backbone_is_one_line_with_the_nearest_name(cli):
    line = one_line_error(cli("plan", "resnet5", "--method", "bitfit"))
    assert "resnet50" in line


def test_an_unknown_method_is_one_line_with_the_nearest_name(cli):
    assert "bitfit" in one_line_error(cli("plan", BACKBONE, "--method", "bitfitt"))
