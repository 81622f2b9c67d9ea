from __future__ import annotations

import pytest

import torchgraft as tg
from torchgraft.errors import GraftError
from torchgraft.tasks import configure, default_recipe, evaluate, list_recipes, load_recipe, train

from .. import traits


@pytest.mark.parametrize("name", tg.core.methods())
def test_every_registered_method_has_a_recipe_for_itself(name):
    assert tg.method(default_recipe(name)["method"]).name == name
    assert configure("photos", method=name).method == name


@pytest.mark.parametrize("name", list_recipes())
def test_every_bundled_recipe_is_valid_and_names_an_existing_method(name):
    config = configure("photos", recipe=name)
    assert tg.method(config.method)


@pytest.mark.parametrize("name", tg.core.methods())
def test_every_registered_method_trains_with_its_recipe(pictures, tmp_path, name):
    # A method of transformers refuses the family of this ResNet.
    tokens = "test_resnet" in traits.of("refused").get(name, {})
    config = configure(
        str(pictures),
        method=name,
        backbone="test_vit" if tokens else "test_resnet",
        pretrained=False,
        image_size=64,
        epochs=2,
        shots=4,
        device="cpu",
        out=tmp_path / "run",
    )
    result = train(config, progress=False)
    assert result.epochs == 2
    assert result.trainable_params > 0
    assert evaluate(result.out, device="cpu").confusion == result.confusion


def test_a_method_without_a_recipe_gets_the_defaults():
    assert default_recipe("somebody-elses-method") == {}


def test_an_unknown_recipe_names_the_nearest_one():
    with pytest.raises(GraftError, match="neither a bundled recipe nor a file; did you mean 'conv-adapter'"):
        load_recipe("conv-adaptor")


@pytest.mark.parametrize("text", ["lr: [1", "- a\n- b\n", "just words", "1: 2"])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(GraftError) as error:
        load_recipe(path)
    assert "own.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_recipe_changes_nothing(tmp_path):
    (tmp_path / "own.yaml").write_text("# nothing\n")
    assert load_recipe(tmp_path / "own.yaml") == {}
