import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

from torchgraft.backbones import create_backbone
from torchgraft.backbones.assets import file_digest
from torchgraft.backbones.weights_file import read_weights
from torchgraft.errors import GraftError

NAME = "test_resnet"


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=7).state_dict()


def saved(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def same(model, state, leave_out=()):
    own = model.state_dict()
    return all(torch.equal(own[n], v) for n, v in state.items() if not n.startswith(tuple(leave_out)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_every_kind_of_file_is_read_and_recorded_by_its_hash(tmp_path, source, suffix):
    path = saved(tmp_path / f"w{suffix}", source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_backbone(NAME, weights=path, num_classes=7)
    assert same(model, source)
    assert model.torchgraft_weights == f"file:sha256:{file_digest(path)}"
    assert not model.training


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path, source, wrapper, prefix):
    content = {wrapper: {prefix + n: v for n, v in source.items()}, "epoch": 3}
    model = create_backbone(NAME, weights=saved(tmp_path / "w.pth", content), num_classes=7)
    assert same(model, source)


@pytest.mark.parametrize("num_classes", [None, 5, 0])
def test_a_classifier_of_another_size_is_left_out_with_a_note(tmp_path, source, num_classes):
    path = saved(tmp_path / "w.safetensors", source)
    with pytest.warns(UserWarning, match=r"the classifier \(fc\.bias, fc\.weight\) does not fit"):
        model = create_backbone(NAME, weights=path, num_classes=num_classes)
    assert same(model, source, leave_out=["fc."])
    assert model.num_classes == (1000 if num_classes is None else num_classes)


def test_a_file_without_a_classifier_is_accepted_with_a_note(tmp_path, source):
    body = {n: v for n, v in source.items() if not n.startswith("fc.")}
    with pytest.warns(UserWarning, match="does not fit"):
        model = create_backbone(NAME, weights=saved(tmp_path / "w.pt", body), num_classes=7)
    assert same(model, body)


def test_other_differences_name_the_keys(tmp_path, source):
    wrong = dict(source)
    wrong["layer9.weight"] = wrong.pop("layer1.0.conv1.weight")
    wrong["conv1.0.weight"] = torch.zeros(1, 2, 3, 4)
    with pytest.raises(GraftError) as caught:
        create_backbone(NAME, weights=saved(tmp_path / "w.pt", wrong), num_classes=7)
    message = str(caught.value)
    assert "1 missing: layer1.0.conv1.weight" in message
    assert "1 unexpected: layer9.weight" in message
    assert "1 of another shape: conv1.0.weight (1, 2, 3, 4) instead of (" in message
    assert "\n" not in message


def test_a_feature_extractor_takes_the_weights_of_the_whole_model(tmp_path, source):
    path = saved(tmp_path / "w.safetensors", source)
    whole = create_backbone(NAME, weights=path, num_classes=7)
    maps = create_backbone(NAME, weights=path, features_only=True, out_indices=(2,), num_classes=7)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(maps(x)[0], whole.forward_intermediates(x, indices=[2], intermediates_only=True)[0])
    assert maps.torchgraft_weights.startswith("file:sha256:")


def test_position_embeddings_of_another_size_are_resized_by_timms_own_rule(tmp_path):
    small = timm.create_model("test_vit", num_classes=0, img_size=64)
    path = saved(tmp_path / "w.safetensors", small.state_dict())
    model = create_backbone("test_vit", weights=path, num_classes=0, img_size=96)
    assert model.pos_embed.shape[1] == 37
    assert same(model, small.state_dict(), leave_out=["pos_embed"])


class Harmful:
    def __reduce__(self):
        return (print, ("code from a weights file ran",))


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path = saved(tmp_path / "w.pt", {"state_dict": {"x": Harmful()}})
    with pytest.raises(GraftError, match=r"more than tensors.*model.state_dict"):
        create_backbone(NAME, weights=path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_file_is_named(tmp_path, source, suffix):
    path = saved(tmp_path / f"w{suffix}", source)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(GraftError, match=rf"cannot read weights from .*w{suffix}"):
        create_backbone(NAME, weights=path)


def test_files_that_hold_no_weights_are_refused(tmp_path):
    with pytest.raises(GraftError, match="there is no weights file"):
        create_backbone(NAME, weights=tmp_path / "nowhere.pt")
    with pytest.raises(GraftError, match="no tensors under names"):
        create_backbone(NAME, weights=saved(tmp_path / "w.pt", [torch.zeros(1)]))
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(GraftError, match=r"expected a \.safetensors"):
        create_backbone(NAME, weights=tmp_path / "w.npz")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_ema", "state_dict_ema", "module"])
def test_a_state_dict_is_found_under_every_key_that_published_files_use(tmp_path, wrapper):
    torch.save({wrapper: {"weight": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["weight"]
