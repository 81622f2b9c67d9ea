import json
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from torchgraft.data import eval_transform_from, transforms_for
from torchgraft.errors import GraftError

CONFIG = {"input_size": (3, 56, 56), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.875}


def picture(size=(28, 28)):
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("augment", ["light", "standard", "none"])
def test_the_configuration_survives_json_and_rebuilds_the_evaluation(augment):
    made = transforms_for(CONFIG, augment=augment)
    again = eval_transform_from(json.loads(json.dumps(made.config)))
    for size in ((28, 28), (90, 40)):
        assert torch.equal(made.eval(picture(size)), again(picture(size)))
        assert made.train(picture(size)).shape == made.eval(picture(size)).shape == (3, 56, 56)


def test_transforms_can_be_sent_to_loader_processes():
    made = pickle.loads(pickle.dumps(transforms_for(CONFIG)))
    assert made.train(picture()).shape == (3, 56, 56)


def test_light_shows_the_whole_picture_in_evaluation_and_shifts_it_a_little_in_training():
    edges = np.zeros((56, 56), np.uint8)
    edges[:, 0] = edges[:, -1] = 255
    image = Image.fromarray(edges).convert("RGB")
    light, standard = transforms_for(CONFIG), transforms_for(CONFIG, augment="standard")
    assert light.eval(image)[:, :, 0].min() == light.eval(image)[:, :, -1].min() == 1
    assert standard.eval(image).max() < 1, "the centre crop hides the border"

    gradient = Image.fromarray(np.tile(np.arange(56, dtype=np.uint8) * 4, (56, 1))).convert("RGB")
    made = transforms_for(CONFIG, mirror=False)
    plain = made.eval(gradient)
    torch.manual_seed(0)
    moved = {round(float((made.train(gradient) - plain)[0, :, 10:-10].mean() * 127.5 / 4)) for _ in range(100)}
    assert moved == set(range(-4, 5)), "every shift up to 1/14 of 56 pixels, and no other"


def test_small_pictures_are_scaled_up_smoothly():
    dots = np.zeros((14, 14), np.uint8)
    dots[7, 7] = 255
    out = transforms_for(CONFIG).eval(Image.fromarray(dots).convert("RGB"))
    assert out.unique().numel() > 10, "bicubic; nearest would leave two values"


@pytest.mark.parametrize("augment", ["light", "standard"])
@pytest.mark.parametrize("mirror", [True, False])
def test_training_mirrors_only_where_the_label_survives_it(augment, mirror):
    half = Image.new("RGB", (56, 56))
    half.paste((255, 255, 255), (0, 0, 28, 56))
    made = transforms_for(CONFIG, mirror=mirror, augment=augment)
    torch.manual_seed(0)
    # A crop far to one side can miss the edge, then both means are equal.
    turned = [float(x[..., :8].mean()) < float(x[..., -8:].mean()) for x in (made.train(half) for _ in range(60))]
    assert any(turned) == mirror


def test_none_trains_on_what_it_evaluates():
    made = transforms_for(CONFIG, augment="none")
    assert torch.equal(made.train(picture()), made.eval(picture()))


def test_a_timm_model_brings_its_own_configuration():
    model = timm.create_model("tf_efficientnet_lite0")
    config = transforms_for(model).config
    assert config["mean"] == config["std"] == [0.5, 0.5, 0.5]
    assert config["input_size"] == [3, 224, 224]
    assert transforms_for(model, image_size=84).config["input_size"] == [3, 84, 84]


def test_a_model_built_for_one_size_is_fed_that_size():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64)
    assert transforms_for(model).config["input_size"] == [3, 64, 64]
    with pytest.raises(GraftError, match=r"built for 64x64 pixels; build it with create_backbone.*image_size=96"):
        transforms_for(model, image_size=96)


def test_other_models_get_imagenets_values_and_their_own_size():
    config = transforms_for(torchvision.models.squeezenet1_1()).config
    assert (config["input_size"], config["mean"]) == ([3, 224, 224], [0.485, 0.456, 0.406])
    model = torch.nn.Linear(1, 1)
    model.config = type("Config", (), {"image_size": 48})()
    assert transforms_for(model).config["input_size"] == [3, 48, 48]


def test_what_cannot_work_is_refused():
    with pytest.raises(GraftError, match=r"unknown augment 'lite'.*light"):
        transforms_for(CONFIG, augment="lite")
    with pytest.raises(GraftError, match="image_size=0"):
        transforms_for(CONFIG, image_size=0)
    with pytest.raises(GraftError, match="takes 1 channels"):
        transforms_for({"input_size": (1, 28, 28)})
    with pytest.raises(GraftError, match="lacks mean"):
        eval_transform_from({k: v for k, v in transforms_for(CONFIG).config.items() if k != "mean"})
