"""Adapter folders: what is written comes back, and what is damaged is refused without a trace."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.checkpoint import read_tensors

from .attaching import Remembered, disturb, run

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONFIG, WEIGHTS, TASK = "adapter_config.json", "adapter_model.safetensors", "task.json"


def _resnet(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=4, **options).eval()


@pytest.fixture(scope="module")
def trained() -> tg.Adapter:
    """An adapter with a head and statistics of its own, all of it away from its start."""
    adapter = disturb(tg.attach(_resnet(), "conv-adapter", name="pets", num_classes=5, batchnorm="adapt"), 0.05)
    adapter.model.train()
    adapter.model(3 + X)
    adapter.model.eval()
    return adapter


@pytest.fixture(scope="module")
def saved(trained: tg.Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained.save(folder, task={"classes": list("abcde"), "metrics": {"accuracy": 0.5}})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def _edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for name, value in fields.items():
        where, _, inner = name.partition("__")
        (config[where] if inner else config).__setitem__(inner or where, value)
    (folder / CONFIG).write_text(json.dumps(config))


def _assert_refused(folder: Path, message: str, model: nn.Module | None = None, **options: Any) -> None:
    """Loading says ``message`` on one line and leaves no trace on the model."""
    model = _resnet() if model is None else model
    remembered = Remembered(model, X)
    with pytest.raises(tg.GraftError, match=message) as raised:
        tg.load(model, folder, **options)
    assert "\n" not in str(raised.value)
    assert tg.adapters(model) == {}
    remembered.assert_same()


# -- round trips ----------------------------------------------------------------------------------------


def test_a_loaded_adapter_is_bit_equal_and_so_is_its_output(trained: tg.Adapter, saved: Path) -> None:
    model = _resnet()
    adapter = tg.load(model, saved)
    assert (adapter.name, adapter.method, adapter.num_classes) == ("pets", trained.method, 5)
    assert adapter.batchnorm == "adapt"
    assert [s.address for s in adapter.sites] == [s.address for s in trained.sites]
    assert tg.active(model) == "pets"
    wanted = trained.state_dict()
    assert list(adapter.state_dict()) == list(wanted)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
        assert tensor.dtype == wanted[name].dtype
    assert torch.equal(run(model, X), run(trained.model, X))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_lower_precision_is_as_exact_as_its_mantissa(
    trained: tg.Adapter, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    trained.save(tmp_path, dtype=dtype)
    stored = read_tensors(tmp_path)
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    adapter = tg.load(_resnet(), tmp_path)
    for name, tensor in trained.state_dict().items():
        assert stored[name].dtype == (wanted if tensor.is_floating_point() else tensor.dtype)
        loaded = adapter.state_dict()[name]
        assert loaded.dtype == tensor.dtype
        assert (loaded - tensor).abs().max() <= tolerance * tensor.abs().max() + 6e-8


@pytest.mark.parametrize("dtype", ["fp17", torch.int8, torch.complex64, 16])
def test_a_dtype_that_cannot_hold_weights_is_refused(trained: tg.Adapter, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(tg.GraftError, match="dtype"):
        trained.save(tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


def test_the_folder_holds_what_the_documentation_says(trained: tg.Adapter, saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS, TASK]
    config = tg.read_config(saved)
    assert config["method"] == "conv-adapter"
    assert config["num_classes"] == 5
    assert config["backbone"]["architecture"] == "test_resnet"
    assert config["parameters"] == trained.num_parameters()
    assert set(load_file(saved / WEIGHTS)) == set(trained.state_dict())
    assert tg.read_task(saved) == {"classes": list("abcde"), "metrics": {"accuracy": 0.5}}
    card = (saved / "README.md").read_text()
    assert "test_resnet" in card
    assert "accuracy: 0.5000" in card


def test_a_folder_without_a_task_has_none(trained: tg.Adapter, tmp_path: Path) -> None:
    trained.save(tmp_path)
    assert tg.read_task(tmp_path) is None


def test_an_adapter_can_be_loaded_under_another_name_beside_the_first(saved: Path) -> None:
    model = _resnet()
    tg.load(model, saved)
    twin = tg.load(model, saved, name="again")
    assert list(tg.adapters(model)) == ["pets", "again"]
    assert tg.active(model) == "again"
    assert twin.name == "again"
    second = run(model, X)
    tg.activate(model, "pets")
    assert torch.equal(run(model, X), second)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {}),
        ("bitfit", {"num_classes": 3}),
        ("conv-adapter + bitfit", {}),
        (["norm-tuning", "conv-adapter[reduction=8]"], {"num_classes": 2, "batchnorm": "train"}),
        ("conv-adapter", {"include": "stages[1:]", "exclude": "*.conv2"}),
        ("linear", {"num_classes": 3}),
    ],
    ids=str,
)
def test_every_form_of_an_adapter_comes_back(method: Any, options: dict[str, Any], tmp_path: Path) -> None:
    adapter = disturb(tg.attach(_resnet(), method, **options), 0.05)
    adapter.save(tmp_path)
    model = _resnet()
    loaded = tg.load(model, tmp_path)
    assert loaded.method == adapter.method
    assert list(loaded.state_dict()) == list(adapter.state_dict())
    assert torch.equal(run(model, X), run(adapter.model, X))


def test_a_model_whose_input_cannot_be_guessed_gets_its_whole_adapter_back_or_an_error(
    tmp_path: Path,
) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.fc(self.conv(self.stem(x) * factor).mean((2, 3)))

    torch.manual_seed(0)
    model, inputs = TwoInputs().eval(), (torch.randn(2, 3, 8, 8), torch.ones(1))
    twin = copy.deepcopy(model)
    adapter = tg.attach(model, "conv-adapter", num_classes=7, example=(inputs, {}))
    disturb(adapter).save(tmp_path)
    try:
        tg.load(twin, tmp_path)
    except tg.GraftError as error:
        assert "example" in str(error)
        loaded = tg.load(twin, tmp_path, example=(inputs, {}))  # type: ignore[call-arg]
        assert loaded.head is not None
    assert torch.equal(run(twin, *inputs), run(model, *inputs))


# -- other backbones ------------------------------------------------------------------------------------


def test_another_architecture_is_an_error_that_names_both(saved: Path) -> None:
    model = timm.create_model("test_convnext", num_classes=4).eval()
    _assert_refused(saved, "trained on 'test_resnet', the model here is 'test_convnext'", model)
    _assert_refused(saved, "trained on 'test_resnet', the model here is 'test_convnext'", model, strict=False)


def test_other_weights_are_refused_unless_they_are_asked_for(trained: tg.Adapter, saved: Path) -> None:
    model = _resnet(seed=7)
    _assert_refused(saved, r"other weights of 'test_resnet': the weights of .* differ.*strict=False", model)
    adapter = tg.load(model, saved, strict=False)
    wanted = trained.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in adapter.state_dict().items())


def test_one_changed_weight_is_found_and_its_part_named(saved: Path) -> None:
    model = _resnet()
    with torch.no_grad():
        model.layer3[0].conv1.weight[0, 0, 0, 0] += 1e-3
    _assert_refused(saved, r"the weights of stages\[2\] differ", model)


def test_a_changed_running_statistic_is_found(saved: Path) -> None:
    model = _resnet()
    model.layer2[0].bn1.running_var.mul_(1.001)
    _assert_refused(saved, r"the weights of stages\[1\] differ", model)


def test_another_classifier_of_the_backbone_does_not_matter(saved: Path, trained: tg.Adapter) -> None:
    model = _resnet()
    model.reset_classifier(11)
    tg.load(model, saved)
    assert torch.equal(run(model, X), run(trained.model, X))


def test_the_fingerprint_ignores_what_adapters_do(trained: tg.Adapter) -> None:
    model = _resnet()
    plain = tg.fingerprint(tg.anatomy(model))
    disturb(tg.attach(model, "full", batchnorm="train"))
    assert tg.fingerprint(tg.anatomy(model)) == plain
    assert tg.fingerprint(tg.anatomy(trained.model)) == plain


# -- damaged files --------------------------------------------------------------------------------------


DAMAGED_CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read as JSON"),
    "half": (b'{"format": 1, "meth', "cannot be read as JSON"),
    "no UTF-8": (b"\xff\xfe{}", "cannot be read as JSON"),
    "list": (b"[1, 2]", "holds a list; expected an object"),
    "word": (b'"adapter"', "holds a str; expected an object"),
    "null": (b"null", "holds a NoneType; expected an object"),
    "deep lists": (b"[" * 100_000, "cannot be read as JSON"),
    "deep objects": (b'{"a":' * 100_000, "cannot be read as JSON"),
    "an endless number": (b'{"format": ' + b"9" * 10_000 + b"}", "cannot be read as JSON"),
    "nothing inside": (b"{}", "the field 'format' is missing"),
}


@pytest.mark.parametrize("damage", DAMAGED_CONFIGS)
def test_a_config_that_is_no_config_is_refused(folder: Path, damage: str) -> None:
    content, message = DAMAGED_CONFIGS[damage]
    (folder / CONFIG).write_bytes(content)
    _assert_refused(folder, message)


FIELDS = ("format", "torchgraft_version", "name", "method", "method_config", "num_classes", "batchnorm",
          "include", "exclude", "sites", "parameters", "backbone")  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[field]
    (folder / CONFIG).write_text(json.dumps(config))
    _assert_refused(folder, f"the field '{field}' is missing")


@pytest.mark.parametrize("value", [True, 1.5, "word", [1], {"a": 1}, None], ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_wrong_type_is_never_an_error_of_python(folder: Path, field: str, value: Any) -> None:
    valid = json.loads((folder / CONFIG).read_text())[field]
    if type(value) is type(valid) or (value is None and field in ("num_classes", "include", "exclude")):
        pytest.skip("of the right type")
    if isinstance(value, list) and field in ("include", "exclude"):
        value = [1]
    _edit(folder, **{field: value})
    _assert_refused(folder, field)


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "a newer format": ({"format": 99}, "format 99 is newer than this torchgraft reads"),
    "a format below the first": ({"format": 0}, "format"),
    "an unknown method": ({"method": "conv-adaptor"}, "unknown method 'conv-adaptor'; did you mean 'conv-adapter'"),
    "a method by its path": ({"method": "os.system"}, "unknown method 'os.system'"),
    "an unknown option": ({"method_config": {"reductoin": 4}}, "unknown option 'reductoin'; did you mean 'reduction'"),
    "an option of the wrong type": ({"method_config": {"reduction": "four"}}, "reduction='four' is not valid"),
    "an option out of range": ({"method_config": {"reduction": 0}}, "reduction=0 is not valid"),
    "a combination of nothing": ({"method": "combination", "method_config": {}}, "combination"),
    "a combination of numbers": ({"method": "combination", "method_config": {"parts": [1]}}, "combination"),
    "a combination of nameless parts": ({"method": "combination", "method_config": {"parts": [{}]}}, "combination"),
    "a name with a path": ({"name": "../../etc/passwd"}, "name='../../etc/passwd'"),
    "an empty name": ({"name": ""}, "name=''"),
    "a name that is taken by python": ({"name": "keys"}, "name='keys'"),
    "another policy": ({"batchnorm": "thawed"}, "batchnorm='thawed'"),
    "sites that are numbers": ({"sites": [1]}, "sites holds something else than addresses"),
    "a selection that matches nothing": ({"include": ["stages[9]"]}, r"'stages\[9\]' names no module"),
    "an empty selection": ({"include": []}, "include"),
    "a fingerprint without parts": ({"backbone": {"architecture": "test_resnet"}}, "fingerprint is damaged"),
    "a fingerprint with an architecture that is no name": ({"backbone__architecture": 4}, "fingerprint is damaged"),
    "a fingerprint whose parts are no hashes": ({"backbone__parts": {"stem": ["a"]}}, "weights of stem differ|damaged"),
    "more classes than the head has": ({"num_classes": 7}, r"\(5, \d+\).*\(7, \d+\).*number of classes differs"),
    "no classes at all": ({"num_classes": None}, "head"),
    "zero classes": ({"num_classes": 0}, "num_classes=0"),
    "classes that no memory holds": ({"num_classes": 10**12}, "classes"),
    "a kernel that no memory holds": ({"method_config": {"kernel": 10**9}}, "kernel|shape"),
    "another width": ({"method_config": {"reduction": 8}}, "has shape .* in the state, the adapter needs"),
    "other sites": ({"include": ["stages[0]"]}, "which this model lacks"),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_config_that_does_not_fit_is_refused(folder: Path, case: str) -> None:
    fields, message = VALUES[case]
    _edit(folder, **fields)
    _assert_refused(folder, message)


DAMAGED_WEIGHTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:20]),
    "cut in the middle": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "cut by one byte": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "a header of lies": lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]),
    "a pickle": lambda p: torch.save({"a": torch.zeros(1)}, p),
    "text": lambda p: p.write_text("not a safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_damaged_weights_are_refused(folder: Path, damage: str) -> None:
    DAMAGED_WEIGHTS[damage](folder / WEIGHTS)
    _assert_refused(folder, "adapter_model.safetensors is damaged")


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    _assert_refused(folder, f"{WEIGHTS} does not exist")
    (folder / CONFIG).unlink()
    _assert_refused(folder, f"{CONFIG} does not exist")
    _assert_refused(tmp_path / "nowhere", "is not a folder; expected an adapter folder")
    (tmp_path / "file").write_text("")
    _assert_refused(tmp_path / "file", "is not a folder")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_may_not_be_read_is_refused(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()  # nobody can read a folder as a file, whatever the rights of the user
    _assert_refused(folder, name)


def test_lost_and_unknown_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(n for n in tensors if "conv2.weight" in n))
    save_file({n: t for n, t in tensors.items() if n != name}, folder / WEIGHTS)
    _assert_refused(folder, "lacks tensor '" + name.replace("[", r"\[") + "'")
    save_file({**tensors, "../../etc/passwd": torch.zeros(1)}, folder / WEIGHTS)
    _assert_refused(folder, r"'\.\./\.\./etc")


def test_a_name_like_a_path_is_a_key_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "../outside": torch.ones(1)}, folder / WEIGHTS)
    adapter = tg.load(_resnet(), folder, strict=False)
    assert torch.equal(adapter.parked["../outside"], torch.ones(1))
    before = sorted(p for p in tmp_path.rglob("*"))
    adapter.save(folder)
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert torch.equal(load_file(folder / WEIGHTS)["../outside"], torch.ones(1)), "and it is not lost"


def test_a_tensor_of_another_shape_is_refused_before_anything_is_copied(trained: tg.Adapter) -> None:
    model = _resnet()
    adapter = tg.attach(model, trained.method, num_classes=5, batchnorm="adapt")
    before = {n: t.clone() for n, t in adapter.state_dict().items()}
    state = dict(trained.state_dict())
    last = list(state)[-1]
    state[last] = torch.zeros(99)
    with pytest.raises(tg.GraftError, match="needs"):
        adapter.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in adapter.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"[1]", b"{"])
def test_a_damaged_task_is_refused(folder: Path, content: bytes) -> None:
    (folder / TASK).write_bytes(content)
    with pytest.raises(tg.GraftError, match=r"task\.json"):
        tg.read_task(folder)


# -- failures on the way --------------------------------------------------------------------------------


def _other_classes(folder: Path) -> None:
    _edit(folder, num_classes=7)


def _unknown_tensor(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "blocks[99]/delta.value": torch.zeros(1)}, folder / WEIGHTS)


@pytest.mark.parametrize("damage", [_other_classes, _unknown_tensor])
@pytest.mark.parametrize("active", ["one", "two", None])
def test_a_failed_load_leaves_other_adapters_and_the_active_one_as_they_were(
    folder: Path, active: str | None, damage: Callable[[Path], None]
) -> None:
    model = _resnet()
    for name in ("one", "two"):
        disturb(tg.attach(model, "conv-adapter", name=name, num_classes=3))
    tg.activate(model, active)
    remembered = Remembered(model, X)
    damage(folder)
    with pytest.raises(tg.GraftError):
        tg.load(model, folder)
    assert list(tg.adapters(model)) == ["one", "two"]
    assert tg.active(model) == active
    remembered.assert_same()


def test_a_name_in_use_is_refused_and_the_first_adapter_stays(saved: Path) -> None:
    model = _resnet()
    first = tg.load(model, saved)
    wanted = run(model, X)
    with pytest.raises(tg.GraftError, match="already has an adapter 'pets'"):
        tg.load(model, saved)
    assert tg.adapters(model) == {"pets": first}
    assert torch.equal(run(model, X), wanted)


@pytest.mark.parametrize("failing", ["weights", "config"])
def test_a_full_disk_leaves_the_old_files_intact(folder: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    adapter = disturb(tg.load(_resnet(), folder))

    def full(*args: Any, **_: Any) -> None:
        target = next(a for a in args if isinstance(a, (str, Path)))
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if failing == "weights":
        monkeypatch.setattr("torchgraft.core.checkpoint.save_file", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(tg.GraftError, match="No space left on device") as raised:
        adapter.save(folder, task={"classes": ["other"]})
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    tg.load(_resnet(), folder)


def test_the_metadata_that_safetensors_cannot_write_is_an_error_for_people(
    trained: tg.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def refuse(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("torchgraft.core.checkpoint.save_file", refuse)
    with pytest.raises(tg.GraftError, match="No space left on device"):
        trained.save(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


# -- checkpoints of the backbone ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["conv-adapter", "full", "conv-adapter + norm-tuning"])
def test_a_plain_checkpoint_of_the_backbone_loads_strictly_into_an_adapted_model(method: str) -> None:
    model, other = _resnet(), _resnet(seed=7)
    adapter = disturb(tg.attach(model, method, num_classes=5))
    kept = {n: t.clone() for n, t in adapter.state_dict().items()}
    result = model.load_state_dict(other.state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert all(torch.equal(t, kept[n]) for n, t in adapter.state_dict().items())
    tg.activate(model, None)
    assert torch.equal(run(model, X), run(other, X))


def test_a_full_state_of_an_adapted_model_loads_strictly_into_its_twin(trained: tg.Adapter) -> None:
    model = _resnet(seed=7)
    adapter = tg.attach(model, trained.method, name="pets", num_classes=5, batchnorm="adapt")
    model.load_state_dict(trained.model.state_dict(), strict=True)
    assert torch.equal(run(model, X), run(trained.model, X))
    wanted = trained.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in adapter.state_dict().items())


def test_half_a_state_of_an_adapter_is_still_an_error(trained: tg.Adapter) -> None:
    state = dict(trained.model.state_dict())
    lost = next(n for n in state if n.endswith("form.conv1.weight"))
    del state[lost]
    with pytest.raises(RuntimeError, match=lost.replace(".", r"\.")):
        copy.deepcopy(trained.model).load_state_dict(state, strict=True)
    del state["conv1.0.weight"]
    with pytest.raises(RuntimeError, match=r"conv1\.0\.weight"):
        copy.deepcopy(trained.model).load_state_dict(state, strict=True)


def test_keys_of_the_backbone_do_not_change() -> None:
    model = _resnet()
    keys = list(model.state_dict())
    tg.attach(model, "full", num_classes=5)
    assert [k for k in model.state_dict() if "torchgraft" not in k] == keys


# -- twins without a classifier -------------------------------------------------------------------------


def _features(seed: int = 0) -> nn.Module:
    model = timm.create_model("test_resnet", features_only=True).eval()
    model.load_state_dict({k: v for k, v in _resnet(seed).state_dict().items() if not k.startswith("fc.")})
    return model


def test_an_adapter_visits_a_feature_extractor_and_comes_back_with_its_head(
    trained: tg.Adapter, saved: Path, tmp_path: Path
) -> None:
    twin = _features()
    visitor = tg.load(twin, saved)
    assert visitor.head is None
    assert sorted(visitor.parked) == ["head.bias", "head.weight"]
    with torch.no_grad():
        for found, wanted in zip(twin(X), trained.model.forward_intermediates(X, intermediates_only=True), strict=True):
            assert torch.equal(found, wanted)
    visitor.save(tmp_path)
    model = _resnet()
    tg.load(model, tmp_path)
    assert torch.equal(run(model, X), run(trained.model, X))


def test_a_state_without_the_parked_head_is_refused_before_anything_is_copied(saved: Path) -> None:
    visitor = tg.load(_features(), saved)
    before = {n: t.clone() for n, t in visitor.state_dict().items()}
    state = {n: torch.zeros_like(t) for n, t in before.items() if not n.startswith("head.")}
    try:
        visitor.load_state_dict(state)
    except tg.GraftError:
        assert all(torch.equal(t, before[n]) for n, t in visitor.state_dict().items())
    else:
        assert all(torch.equal(visitor.parked[n], before[n]) for n in ("head.weight", "head.bias"))


def test_two_placements_of_one_name_at_one_module_are_saved_and_loaded(tmp_path: Path) -> None:
    model, twin = _resnet(), _resnet()
    twin.load_state_dict(model.state_dict())
    adapter = disturb(tg.attach(model, "conv-adapter[reduction=4] + conv-adapter[reduction=8]", num_classes=3))
    adapter.save(tmp_path)
    loaded = tg.load(twin, tmp_path)
    assert list(loaded.state_dict()) == list(adapter.state_dict())
    assert torch.equal(run(twin, X), run(model, X))
