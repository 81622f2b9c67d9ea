"""The prefix cache of a run: the same result, the same files again, and never those of something else."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from torchgraft.backbones import create_backbone
from torchgraft.core import attach, read_tensors
from torchgraft.core.prefix import until_cut
from torchgraft.data import load_data, transforms_for
from torchgraft.data.activations import ActivationFile
from torchgraft.errors import GraftError
from torchgraft.tasks import classification, prefix_origin, train
from torchgraft.tasks.prefix_cache import prefix_cache

from ..cli.conftest import speak

NETWORKS = {
    "conv-adapter": {"backbone": "test_efficientnet", "include": "stages[2:]"},
    "lora": {"backbone": "test_vit", "include": "blocks[3:]"},
    "linear": {"backbone": "test_efficientnet", "include": None},
}


@pytest.fixture
def cached(tiny):
    """Makes the settings of a run of a second with the cache."""
    base = {"include": "stages[2:]", "augment": "none", "epochs": 2, "cache_prefix": True, "channels_last": True}
    return lambda **changes: tiny(**{**base, **changes})


@pytest.fixture
def folder(pictures, tmp_path):
    """Pictures that a test may change: four train and two val a class."""
    root = tmp_path / "own"
    for part, size in (("train", 4), ("val", 2)):
        for name in ("blue", "green", "red"):
            (root / part / name).mkdir(parents=True)
            for number in range(size):
                shutil.copy(pictures / part / name / f"{number}.png", root / part / name)
    return root


@dataclasses.dataclass
class Prepared:
    """What a run has when it comes to its cache."""

    config: object
    data: object
    transforms: object
    model: torch.nn.Module

    def used(self, cache, console=None):
        """Compute or find the cache; what was yielded, and the lines that were shown."""
        shown = io.StringIO()
        console = console or Console(file=shown, width=1000)
        device = torch.device("cpu")
        with prefix_cache(self.model, self.data, self.transforms, self.config, cache, device, console) as found:
            rows = [found.data.train[i] for i in range(len(found.data.train))]
        return rows, shown.getvalue()


def prepared(config):
    torch.manual_seed(0)
    model = create_backbone(config.backbone, pretrained=False, image_size=config.image_size)
    data = load_data(config.data)
    transforms = transforms_for(model, image_size=config.image_size, augment="none")
    attach(model, config.method, num_classes=len(data.classes), include=config.include, batchnorm=config.batchnorm)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    return Prepared(config, data, transforms, model)


def names(cache):
    return sorted(path.name for path in cache.iterdir())


# -- results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NETWORKS)
def test_a_run_from_float32_ends_with_the_very_weights_of_the_run_without_the_cache(cached, tmp_path, method):
    same = {"method": method, **NETWORKS[method], "cache_dtype": "float32"}
    plain = train(cached(out=tmp_path / "plain", **{**same, "cache_prefix": False}), progress=False)
    kept = train(cached(out=tmp_path / "kept", **same), progress=False)
    expected, found = read_tensors(plain.out / "adapter"), read_tensors(kept.out / "adapter")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert sum(bool(tensor.any()) for tensor in expected.values()) > len(expected) / 2  # it was trained
    assert [row["val_loss"] for row in kept.history] == [row["val_loss"] for row in plain.history]
    assert kept.loss == plain.loss


def test_a_run_from_float16_ends_close_by_and_keeps_half_the_bytes(cached, tmp_path):
    plain = train(cached(out=tmp_path / "plain", cache_prefix=False), progress=False)
    kept = train(cached(out=tmp_path / "kept"), progress=False)
    assert [row["val_loss"] for row in kept.history] == pytest.approx(
        [row["val_loss"] for row in plain.history], rel=1e-2
    )
    rows = [np.load(path, mmap_mode="r") for path in (kept.out / "prefix-cache").glob("*.npy")]
    assert sorted(r.shape for r in rows) == [(24, 4, 4, 48), (48, 4, 4, 48)]
    assert {r.dtype for r in rows} == {np.dtype("float16")}


def test_an_interrupted_run_goes_on_from_the_same_files_to_the_same_weights(cached, tmp_path, monkeypatch):
    whole = train(cached(out=tmp_path / "whole"), progress=False)
    config = cached(out=tmp_path / "stopped", checkpoint_every=1)
    step, done = classification.ClassificationTask.training_step, iter(range(4))

    def stopping(self, batch, batch_idx):
        if next(done, None) is None:
            raise GraftError("the power failed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(GraftError, match="the power failed"):
        patch.setattr(classification.ClassificationTask, "training_step", stopping)
        train(config, progress=False)
    monkeypatch.setattr(ActivationFile, "write", lambda *args: pytest.fail("it was computed again"))
    resumed = train(config, resume=True, progress=False)
    expected, found = read_tensors(whole.out / "adapter"), read_tensors(resumed.out / "adapter")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_that_is_overwritten_uses_its_files_again(cached, tmp_path, monkeypatch):
    config = cached(out=tmp_path / "run")
    first = train(config, progress=False)
    monkeypatch.setattr(ActivationFile, "write", lambda *args: pytest.fail("it was computed again"))
    assert train(config.model_copy(update={"head_lr": 0.002}), overwrite=True, progress=False).loss != first.loss


def test_frozen_weights_in_bfloat16_are_kept_as_they_are(cached, tmp_path):
    same = {"frozen_dtype": "bf16"}
    plain = train(cached(out=tmp_path / "plain", cache_prefix=False, **same), progress=False)
    kept = train(cached(out=tmp_path / "kept", **same), progress=False)
    expected, found = read_tensors(plain.out / "adapter"), read_tensors(kept.out / "adapter")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_loader_processes_read_the_same_file(cached, folder, tmp_path):
    prepared_run = prepared(cached(data=str(folder)))
    with prefix_cache(*_arguments(prepared_run, tmp_path / "cache")) as found:
        alone = torch.stack([found.data.train[i][0] for i in range(12)])
        loader = torch.utils.data.DataLoader(found.data.train, batch_size=12, num_workers=1)
        assert torch.equal(next(iter(loader))[0], alone)


def _arguments(run, cache):
    return run.model, run.data, run.transforms, run.config, cache, torch.device("cpu")


def test_images_keep_their_labels_and_their_order(cached, folder, tmp_path):
    run = prepared(cached(data=str(folder), cache_dtype="float32"))
    with prefix_cache(*_arguments(run, tmp_path / "cache")) as found:
        part = found.data.train.subset([7, 2])
        kept = torch.stack([row for row, _ in part])
        assert [label for _, label in part] == [run.data.train.labels[i] for i in (7, 2)]
        assert part.ids == [run.data.train.ids[i] for i in (7, 2)]
    images = torch.stack([run.transforms.eval(run.data.train.image(i)) for i in (7, 2)])
    with until_cut(run.model.eval(), part.file.cut) as prefix:
        torch.testing.assert_close(kept, prefix(images.contiguous(memory_format=torch.channels_last)))


# -- the same files again -----------------------------------------------------------------------------------


def test_what_was_computed_is_found_again_with_the_same_values(cached, folder, tmp_path):
    cache, config = tmp_path / "cache", cached(data=str(folder))
    rows, shown = prepared(config).used(cache)
    assert "output of layer2, 48 x 4 x 4 in float16: 1.5 kB an image, 28 kB for 18 images" in shown
    assert "train computed in" in shown
    before = [path.stat().st_mtime_ns for path in sorted(cache.iterdir())]
    same, shown = prepared(config).used(cache)
    assert "found from an earlier run, nothing to compute" in shown
    assert [path.stat().st_mtime_ns for path in sorted(cache.iterdir())] == before
    assert all(torch.equal(a, b) and m == n for (a, m), (b, n) in zip(rows, same, strict=True))


def test_another_method_from_the_same_site_on_uses_the_same_files(cached, folder, tmp_path):
    shared = tmp_path / "shared"
    prepared(cached(data=str(folder), cache_dir=shared)).used(tmp_path)
    _, shown = prepared(cached(data=str(folder), cache_dir=shared, method="lora")).used(tmp_path)
    assert "nothing to compute" in shown
    assert len(names(shared)) == 4


def _weights(run, folder):
    with torch.no_grad():
        run.model.layer1[0].conv1.weight[0, 0, 0, 0] += 1e-3


def _statistics(run, folder):
    run.model.bn1.running_mean[0] += 1e-3


def _network(run, folder):
    run.model.bn1.eps = 1e-3


def _transform(run, folder):
    run.transforms = transforms_for(run.model, image_size=32, augment="standard")
    run.transforms = dataclasses.replace(run.transforms, train=run.transforms.eval)


def _picture(run, folder):
    path = folder / "train" / "red" / "0.png"
    Image.new("RGB", (40, 40)).save(path)
    run.data = load_data(str(folder))


def _time(run, folder):
    os.utime(folder / "train" / "red" / "0.png", ns=(1, 1))


def _labels(run, folder):
    run.data.train.labels[0] = 1 - run.data.train.labels[0]


def _fewer(run, folder):
    run.data = dataclasses.replace(run.data, train=run.data.train.subset(range(11)))


def _version(run, folder, patch):
    patch.setattr(prefix_origin, "VERSION", "0.0.0")


CHANGES = {
    "a weight": (_weights, {}, "the backbone's weights"),
    "a running statistic": (_statistics, {}, "the backbone's weights"),
    "a setting of a layer": (_network, {}, "the backbone"),
    "the transform": (_transform, {}, "the transform"),
    "a picture": (_picture, {}, "the images or their labels"),
    "the time of a file": (_time, {}, "the images or their labels"),
    "a label": (_labels, {}, "the images or their labels"),
    "the list of images": (_fewer, {}, "the images or their labels"),
    "the image size": (None, {"image_size": 48}, "the image size"),
    "the type": (None, {"cache_dtype": "float32"}, "the type"),
    "the first trained site": (None, {"include": "stages[3:]"}, "the first trained site"),
    "the precision": (None, {"precision": "bf16-mixed"}, "the first trained site"),
    "the layout": (None, {"channels_last": False}, "the first trained site"),
    "the version": (_version, {}, "the version of torchgraft, torch, torchvision or timm"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_anything_that_matters_computes_anew_and_says_why(cached, folder, tmp_path, monkeypatch, what):
    cache = tmp_path / "cache"
    prepared(cached(data=str(folder))).used(cache)
    before = set(names(cache))
    change, settings, reason = CHANGES[what]
    run = prepared(cached(data=str(folder), **settings))
    if change is _version:
        change(run, folder, monkeypatch)
    elif change is not None:
        change(run, folder)
    _, shown = run.used(cache)
    assert f"train is computed again: {reason} changed" in shown
    assert "train computed in" in shown
    assert not {name for name in before & set(names(cache)) if name.startswith("train")}
    assert len(names(cache)) == 4


@pytest.mark.parametrize("damage", ["no description", "another description", "cut short", "no rows"])
def test_a_file_that_is_not_whole_is_computed_anew(cached, folder, tmp_path, damage):
    cache, config = tmp_path / "cache", cached(data=str(folder))
    rows, _ = prepared(config).used(cache)
    data, told = next(cache.glob("train-*.npy")), next(cache.glob("train-*.json"))
    if damage == "no description":
        told.unlink()
    elif damage == "another description":
        told.write_text(json.dumps({**json.loads(told.read_text()), "weights": "others"}))
    elif damage == "cut short":
        data.write_bytes(data.read_bytes()[:-100])
    else:
        data.unlink()
    same, shown = prepared(config).used(cache)
    assert "train computed in" in shown
    assert "val computed in" not in shown
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rows, same, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_build_that_is_interrupted_leaves_nothing(cached, folder, tmp_path, monkeypatch, error):
    cache, run = tmp_path / "cache", prepared(cached(data=str(folder), batch_size=4))
    seen = iter(range(2))
    laid = type(run.model.conv1).forward

    def failing(self, x):
        if len(x) == 4 and next(seen, None) is None:
            raise error
        return laid(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(type(run.model.conv1), "forward", failing)
        with pytest.raises((KeyboardInterrupt, GraftError)):
            run.used(cache)
    assert names(cache) == []
    assert "train computed in" in run.used(cache)[1]


def test_a_killed_process_leaves_nothing_that_counts_or_stays(cached, folder, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".train-0123456789abcdef.npy.x1.part").write_bytes(b"half")
    (cache / "notes.txt").write_text("not ours")
    prepared(cached(data=str(folder))).used(cache)
    assert [name for name in names(cache) if not name.endswith((".npy", ".json"))] == ["notes.txt"]


def test_nothing_is_removed_from_a_folder_that_runs_share(cached, folder, tmp_path):
    shared = tmp_path / "shared"
    prepared(cached(data=str(folder), cache_dir=shared)).used(tmp_path)
    prepared(cached(data=str(folder), cache_dir=shared, include="stages[3:]")).used(tmp_path)
    assert len(names(shared)) == 8


# -- refusals -----------------------------------------------------------------------------------------------


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("augment", ["light", "standard"])
def test_random_augmentation_is_refused_before_the_images_are_read(cached, tmp_path, augment):
    with pytest.raises(GraftError, match="--augment none") as error:
        train(cached(augment=augment, data=str(tmp_path / "missing"), out=tmp_path / "run"), progress=False)
    assert augment in one_line(error)


def test_the_command_line_has_the_cache_and_says_what_it_needs(folder, tmp_path):
    words = ["train", folder, "--backbone", "test_resnet", "--no-pretrained", "--image-size", 32, "--epochs", 1]
    words += ["--include", "stages[2:]", "--cache-prefix", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run"]
    refused = speak(*words)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "use --augment none" in refused.err
    spoken = speak(*words, "--augment", "none")
    assert spoken.code == 0
    assert "prefix cache: output of layer2" in spoken.err
    assert len(names(tmp_path / "cache")) == 4


@pytest.mark.parametrize("policy", ["adapt", "train"])
def test_statistics_that_follow_the_batches_are_refused(cached, tmp_path, policy):
    with pytest.raises(GraftError, match='batchnorm="frozen"') as error:
        train(cached(batchnorm=policy, out=tmp_path / "run"), progress=False)
    one_line(error)


def test_a_disk_with_too_little_room_is_told_before_anything_is_computed(cached, folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(GraftError, match=r"28 kB are needed and 20 kB are free in .*--cache-dir") as error:
        prepared(cached(data=str(folder))).used(tmp_path / "cache" / "deep")
    one_line(error)
    assert not (tmp_path / "cache").exists()


def test_values_beyond_float16_are_told_with_what_to_do(cached, folder, tmp_path):
    run = prepared(cached(data=str(folder)))
    with torch.no_grad():
        run.model.bn1.weight.mul_(1e8)
    with pytest.raises(GraftError, match="cache_dtype=float32") as error:
        run.used(tmp_path / "cache")
    one_line(error)
    assert names(tmp_path / "cache") == []


def test_a_terminal_sees_a_bar_with_the_count_and_the_time_left(cached, folder, tmp_path):
    shown = io.StringIO()
    console = Console(file=shown, width=120, force_terminal=True)
    prepared(cached(data=str(folder))).used(tmp_path / "cache", console)
    assert "computing train" in shown.getvalue()
    assert "12/12" in shown.getvalue()
