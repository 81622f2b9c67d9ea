from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from torchgraft.errors import GraftError
from torchgraft.lean.install import LEVELS
from torchgraft.tasks import TrainConfig, configure, parse_options
from torchgraft.tasks.config import LeanLevel


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("lr", "fast", "a number"),
        ("lr", None, "a number"),
        ("lr", "inf", "a finite number"),
        ("lr", -1, "greater than 0"),
        ("epochs", 2.5, "a whole number"),
        ("epochs", 0, "greater than or equal to 1"),
        ("lean", "maybe", "'exact', 'recompute', 'checkpoint', 'compact' or 'off'"),
        ("strict", "maybe", "true or false"),
        ("include", 3, "text or a list of texts"),
        ("augment", "strong", "'none', 'light' or 'standard'"),
        ("warmup", 1.5, "less than 1"),
    ],
)
def test_a_wrong_value_is_one_line_with_field_value_and_expectation(field, given, expected):
    with pytest.raises(GraftError) as error:
        TrainConfig(data="photos", **{field: given})
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{field}: {given!r} was given, expected {expected}")


def test_an_unknown_setting_names_the_nearest_one():
    with pytest.raises(GraftError, match="no setting 'learning_rate_head'"):
        TrainConfig(data="photos", learning_rate_head=1.0)
    with pytest.raises(GraftError, match="did you mean 'warmup'"):
        parse_options(["warm_up=0.1"])


def test_missing_data_says_what_data_is():
    with pytest.raises(GraftError, match="data is missing: folder"):
        TrainConfig()


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(Exception, match="frozen"):
        TrainConfig(data="photos").lr = 1.0


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("0.5", 0.5), ("3", 3.0)])
def test_options_read_numbers_the_way_people_write_them(text, value):
    assert TrainConfig(data="photos", **parse_options([f"lr={text}"])).lr == value


def test_none_means_no_value_except_where_it_is_a_name():
    config = TrainConfig(data="photos", **parse_options(["grad_clip=none", "head_lr=null", "augment=none"]))
    assert (config.grad_clip, config.head_lr, config.augment) == (None, None, "none")


@pytest.mark.parametrize(
    ("text", "level"),
    [("true", "exact"), ("false", "off"), ("off", "off"), ("exact", "exact"), ("compact", "compact"), ("on", "exact")],
)
def test_lean_is_a_level_and_a_switch_as_it_once_was(text, level, tmp_path: Path):
    (tmp_path / "old.yaml").write_text(f"lean: {text}\n")
    assert configure("photos", recipe=tmp_path / "old.yaml").lean == level
    assert TrainConfig(data="photos", **parse_options([f"lean={text}"])).lean == level
    assert TrainConfig(data="photos", lean=text if text != "on" else True).lean == level


def test_the_levels_of_lean_are_those_of_the_library():
    assert get_args(LeanLevel) == (*LEVELS, "off")


def test_an_option_without_equals_sign_shows_the_form():
    with pytest.raises(GraftError, match="key=value"):
        parse_options(["lr"])


def test_options_win_over_the_recipe_file_which_wins_over_the_methods_recipe(tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text("lr: 0.25\nweight_decay: 0.125\n")
    base = configure("photos", method="linear")
    config = configure("photos", method="linear", recipe=own, lr=0.5)
    assert (config.lr, config.weight_decay) == (0.5, 0.125)
    assert config.schedule == base.schedule
    assert base.lr not in (0.25, 0.5)
    assert configure("photos", method="full").lr != base.lr


def test_a_recipe_may_choose_the_method_and_an_option_overrides_it():
    assert configure("photos", recipe="official-conv-adapter").method_name == "conv-adapter"
    assert configure("photos", recipe="official-conv-adapter", method="linear").method == "linear"


def test_a_wrong_key_in_a_recipe_names_the_file_and_the_nearest_key(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("epoch: 3\n")
    with pytest.raises(GraftError, match=r"own\.yaml.*'epoch'.*did you mean 'epochs'"):
        configure("photos", recipe=tmp_path / "own.yaml")


def test_explicit_epochs_lift_the_limits_on_steps_of_the_recipe():
    assert configure("photos", method="conv-adapter").max_steps is not None
    assert configure("photos", method="conv-adapter").min_epoch_steps > 1
    assert configure("photos", method="conv-adapter", epochs=100).max_steps is None
    assert configure("photos", method="conv-adapter", epochs=100).min_epoch_steps == 1
    assert configure("photos", method="conv-adapter", epochs=100, max_steps=7).max_steps == 7


def test_the_method_name_leaves_options_and_further_methods_out():
    assert TrainConfig(data="photos", method="conv-adapter[reduction=8]").method_name == "conv-adapter"
    assert TrainConfig(data="photos", method="bitfit + norm-tuning").method_name == "bitfit"


def test_yaml_holds_every_setting_with_its_description_and_reads_back():
    config = TrainConfig(data="photos", out="runs/a", method="conv-adapter[reduction=8]", include=["a", "b"], lr=1e-5)
    text = config.to_yaml()
    assert TrainConfig(**yaml.safe_load(text)) == config
    for name, field in TrainConfig.model_fields.items():
        assert field.description
        assert f"# {field.description}\n{name}:" in text
