import urllib.error

import pytest
import torch
import torchvision

from torchgraft.backbones import create_backbone
from torchgraft.data import transforms_for
from torchgraft.errors import GraftError


@pytest.fixture
def cached_weights(monkeypatch):
    """Stands for torchvision's download: random weights of the default classifier size."""

    def get(self, *args, **kwargs):
        torch.manual_seed(0)
        name = type(self).__name__.removesuffix("_Weights").lower()
        return torchvision.models.get_model(name, weights=None).state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
@pytest.mark.parametrize("num_classes", [None, 5, 0])
def test_a_torchvision_model_keeps_changes_or_loses_its_classifier(cached_weights, name, num_classes, recwarn):
    model = create_backbone(f"torchvision:{name}", num_classes=num_classes)
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name, weights=None).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        out = model(x)
        if num_classes is None:
            assert torch.equal(out, reference(x))
        elif num_classes:
            assert out.shape == (2, 5)
    own = model.state_dict()
    shared = {n: v for n, v in reference.state_dict().items() if n in own and own[n].shape == v.shape}
    assert len(shared) >= len(reference.state_dict()) - 2
    assert all(torch.equal(own[n], v) for n, v in shared.items())
    assert model.torchgraft_weights.startswith("torchvision:")
    assert any("classifier" in str(w.message) for w in recwarn) == (num_classes is not None)


def test_a_torchvision_vision_transformer_is_built_for_the_image_size(cached_weights):
    model = create_backbone("torchvision:vit_b_32", image_size=64)
    assert model.encoder.pos_embedding.shape[1] == 5
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_a_torchvision_model_brings_its_data_configuration():
    model = create_backbone("torchvision:resnet18", pretrained=False)
    config = transforms_for(model, augment="standard").config
    assert config["input_size"] == [3, 224, 224]
    assert config["interpolation"] == "bilinear"
    assert config["crop_pct"] == 224 / 256
    assert model.torchgraft_weights == "random"


def test_a_torchvision_download_that_fails_names_what_works_locally(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(GraftError, match=r"torchvision:resnet18: .*Name or service not known.*--weights FILE"):
        create_backbone("torchvision:resnet18")


def test_a_weights_file_fits_a_torchvision_model(tmp_path):
    torch.manual_seed(3)
    state = torchvision.models.resnet18(num_classes=4).state_dict()
    torch.save(state, tmp_path / "w.pt")
    model = create_backbone("torchvision:resnet18", weights=tmp_path / "w.pt", num_classes=4)
    assert torch.equal(model.fc.weight, state["fc.weight"])
    assert model.torchgraft_weights.startswith("file:sha256:")


def test_an_unknown_torchvision_name_offers_the_nearest():
    with pytest.raises(GraftError, match=r"no classification model 'resnet19'; .*'resnet18'"):
        create_backbone("torchvision:resnet19")


@pytest.fixture
def vit_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}'
    )
    return tmp_path / "vit", model.eval()


def test_a_transformers_folder_is_loaded_as_it_was_saved(vit_folder):
    folder, source = vit_folder
    model = create_backbone(f"hf:{folder}")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x).logits, source(x).logits)
    config = transforms_for(model).config
    assert (config["input_size"], config["mean"]) == ([3, 32, 32], [0.1, 0.2, 0.3])
    assert model.torchgraft_weights.startswith("file:sha256:")


def test_a_transformers_folder_gives_other_classifiers_and_random_weights(vit_folder):
    folder, source = vit_folder
    assert create_backbone(f"hf:{folder}", num_classes=5).classifier.out_features == 5
    assert not hasattr(create_backbone(f"hf:{folder}", num_classes=0), "classifier")
    fresh = create_backbone(f"hf:{folder}", pretrained=False)
    assert fresh.torchgraft_weights == "random"
    name = "classifier.weight"
    assert not torch.equal(fresh.state_dict()[name], source.state_dict()[name])


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(GraftError, match=r"no folder with a config.json; hf: takes a local folder"):
        create_backbone(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(GraftError, match="cannot load a model from"):
        create_backbone(f"hf:{tmp_path}")


def test_a_folder_that_lacks_weights_of_the_model_is_refused(vit_folder):
    from safetensors.torch import load_file, save_file

    folder, _ = vit_folder
    state = load_file(folder / "model.safetensors")
    gone = next(n for n in state if "layers.1" in n or "layer.1" in n)
    save_file({n: v for n, v in state.items() if n != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GraftError, match="lacks weights of the model"):
        create_backbone(f"hf:{folder}")


def test_without_transformers_the_error_gives_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GraftError, match="run: pip install 'transformers>=5'"):
        create_backbone(f"hf:{tmp_path}")
