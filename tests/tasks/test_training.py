from __future__ import annotations

import csv
import errno
import json
import random
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchgraft as tg
from torchgraft.backbones import create_backbone
from torchgraft.errors import GraftError
from torchgraft.tasks import ClassificationTask, TrainConfig, evaluate, read_config, read_result, train
from torchgraft.tasks.checkpoints import read_checkpoint
from torchgraft.tasks.runs import RunFolder, run_folder


def test_training_learns_and_reports_what_it_did(finished):
    assert finished.part == "test"
    assert finished.accuracy > 0.6
    assert sum(map(sum, finished.confusion)) == finished.test_images == 24
    assert len(finished.worst) == round((1 - finished.accuracy) * 24)
    assert finished.adapter_params + finished.head_params == finished.trainable_params
    assert finished.head_params % 3 == 0
    assert finished.steps == 9
    assert [row["epoch"] for row in finished.history] == [1, 2, 3]
    assert finished.peak_rss_mb > 100
    assert finished.images_per_second > 0
    assert finished.val_accuracy == pytest.approx(finished.history[-1]["val_accuracy"])


def test_the_parameter_counts_are_those_of_the_model(finished):
    model = create_backbone("test_resnet", pretrained=False, num_classes=0)
    assert finished.backbone_params == sum(p.numel() for p in model.parameters())


def test_the_run_folder_holds_what_it_promises(finished, tiny):
    out = finished.out
    assert read_config(out / "config.yaml") == tiny(out=out)
    environment = json.loads((out / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["data"]["train"]["images"] == 48
    assert len(environment["data"]["train"]["sha256"]) == 64
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [float(row["val_accuracy"]) for row in rows] == pytest.approx(
        [row["val_accuracy"] for row in finished.history], rel=1e-5
    )
    assert read_result(out / "summary.json") == finished
    assert not (out / "train_ids.json").exists()
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith("events.out")) == [
        "adapter", "checkpoints", "config.yaml", "environment.json", "metrics.csv", "summary.json",
    ]  # fmt: skip


def test_tensorboard_gets_losses_accuracies_rates_throughput_and_memory(finished):
    events = EventAccumulator(str(finished.out)).Reload()
    names = set(events.Tags()["scalars"])
    assert {"train_loss", "val_loss", "train_accuracy", "val_accuracy"} <= names
    assert {"lr", "head_lr", "images_per_second", "peak_rss_mb"} <= names
    assert len(events.Scalars("val_accuracy")) == 3


def test_a_checkpoint_holds_the_adapter_and_no_backbone(finished):
    model = create_backbone("test_resnet", pretrained=False)
    adapter = tg.attach(model, "conv-adapter", num_classes=3)
    backbone_bytes = sum(p.numel() * 4 for p in model.parameters())
    for name in ("last.ckpt", "best.ckpt"):
        path = finished.out / "checkpoints" / name
        assert read_checkpoint(path)["state_dict"].keys() == adapter.state_dict().keys()
        adapter_bytes = sum(t.numel() * 4 for t in adapter.state_dict().values())
        assert path.stat().st_size < 3.5 * adapter_bytes + 150_000
        assert path.stat().st_size < backbone_bytes


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, "last"), ({"keep": "best"}, "best"), ({"early_stopping": 9}, "best"), ({"keep": "last"}, "last")],
)
def test_the_saved_adapter_holds_the_weights_of_the_epoch_to_keep(tiny, tmp_path, monkeypatch, changes, kept):
    step = ClassificationTask.validation_step

    def spoilt_at_the_end(self, batch, batch_idx):
        images, labels = batch
        step(self, (images, torch.full_like(labels, 2) if self.current_epoch == 2 else labels), batch_idx)

    monkeypatch.setattr(ClassificationTask, "validation_step", spoilt_at_the_end)
    result = train(tiny(out=tmp_path / "run", **changes), progress=False)
    assert (result.best_epoch == 3) == (kept == "last")
    state = read_checkpoint(result.out / "checkpoints" / f"{kept}.ckpt")
    assert result.best_epoch == state["epoch"] + 1
    saved = tg.core.read_tensors(result.out / "adapter")
    assert saved.keys() == state["state_dict"].keys()
    assert all(torch.equal(saved[name], state["state_dict"][name]) for name in saved)


def test_the_same_settings_give_the_same_bits_and_another_seed_others(finished, tiny, tmp_path):
    torch.rand(5), random.random(), np.random.rand()
    again = train(tiny(out=tmp_path / "again"), progress=False)
    other = train(tiny(out=tmp_path / "other", seed=1), progress=False)
    first = tg.core.read_tensors(finished.out / "adapter")
    assert all(torch.equal(v, first[k]) for k, v in tg.core.read_tensors(again.out / "adapter").items())
    assert again.worst == finished.worst
    assert any(not torch.equal(v, first[k]) for k, v in tg.core.read_tensors(other.out / "adapter").items())


def test_training_leaves_the_callers_generators_as_they_were(tiny, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(tiny(out=tmp_path / "run", epochs=1), progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "linear", "optimizer": "sgd", "schedule": "constant", "warmup": 0.0},
        {"augment": "standard", "label_smoothing": 0.1, "grad_clip": None, "keep": "last"},
        {"augment": "none", "accumulate": 2, "monitor": "val_loss", "channels_last": False},
        {"precision": "bf16-mixed", "lean": False, "deterministic": False},
        {"frozen_dtype": "bf16", "lean": "checkpoint"},
        {"frozen_dtype": "bf16", "precision": "bf16-mixed", "lean": "compact", "batchnorm": "adapt"},
        {"lean": "recompute", "fold": False, "backbone": "test_convnext"},
        {"batchnorm": "train"},
        {"batchnorm": "adapt"},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_settings_lead_to_a_finished_run(tiny, tmp_path, changes):
    result = train(tiny(out=tmp_path / "run", epochs=2, **changes), progress=False)
    assert result.epochs == 2
    assert 0 <= result.accuracy <= 1
    assert result.steps == (4 if "accumulate" in changes else 6)


def test_only_a_head_is_trained_by_a_linear_probe(tiny, tmp_path):
    result = train(tiny(out=tmp_path / "run", epochs=1, method="linear"), progress=False)
    assert result.adapter_params == 0
    assert result.trainable_params == result.head_params > 0


def test_few_images_are_passed_several_times_an_epoch(tiny, tmp_path):
    result = train(tiny(out=tmp_path / "run", shots=2, epochs=2, min_epoch_steps=5), progress=False)
    assert (result.steps, result.epochs, result.train_images) == (10, 2, 6)


def test_max_steps_ends_in_the_middle_of_an_epoch_with_a_scored_result(tiny, tmp_path):
    result = train(tiny(out=tmp_path / "run", epochs=30, max_steps=4), progress=False)
    assert (result.steps, result.epochs) == (4, 2)
    assert result.history[-1]["lr"] < 0.005


def test_early_stopping_ends_when_the_monitor_stands_still(tiny, tmp_path):
    result = train(tiny(out=tmp_path / "run", epochs=30, early_stopping=2, lr=1e-9, warmup=0.0), progress=False)
    assert result.stopped_early
    assert result.epochs < 30


def test_few_shot_training_writes_down_what_it_drew(tiny, tmp_path):
    result = train(tiny(out=tmp_path / "run", epochs=1, shots=2), progress=False)
    ids = json.loads((tmp_path / "run" / "train_ids.json").read_text())
    assert len(ids) == result.train_images == 6
    assert len({name.split("/")[-2] for name in ids}) == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(GraftError, match=r"loss became (nan|inf) at step \d+ \(epoch 1\).*last\.ckpt"):
        train(tiny(out=out, lr=1e30, grad_clip=None, warmup=0.0), progress=False)
    state = read_checkpoint(out / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert not (out / "adapter").exists()


def test_an_existing_run_is_neither_overwritten_nor_touched_unasked(finished, tiny):
    before = (finished.out / "summary.json").read_bytes()
    with pytest.raises(GraftError, match="holds a run already"):
        train(tiny(out=finished.out), progress=False)
    assert (finished.out / "summary.json").read_bytes() == before


def test_overwriting_replaces_a_run_and_leaves_other_files(finished, tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    (out / "notes.txt").write_text("mine")
    result = train(tiny(out=out, epochs=1), overwrite=True, progress=False)
    assert result.epochs == 1
    assert len(list(csv.DictReader((out / "metrics.csv").open()))) == 1
    assert len(list(out.glob("events.out*"))) == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_run_is_never_overwritten(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(GraftError, match="holds no torchgraft run"):
        train(tiny(out=tmp_path), overwrite=True, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GraftError, match="cannot write"):
        train(tiny(out=tmp_path / "file" / "run"), progress=False)


def test_a_mistake_in_the_settings_leaves_no_folder_behind(tiny, tmp_path):
    for changes in (
        {"backbone": "test_resnett"},
        {"method": "conv-adaptor"},
        {"data": str(tmp_path / "none")},
    ):
        with pytest.raises(GraftError):
            train(tiny(out=tmp_path / "run", **changes), progress=False)
    assert not (tmp_path / "run").exists()


def test_cuda_where_there_is_none_is_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GraftError, match="'cuda' was asked for, but PyTorch finds none") as error:
        train(tiny(out=tmp_path / "run", device="cuda"), progress=False)
    assert "\n" not in str(error.value)


def test_lean_levels_that_promise_the_same_bits_end_with_the_same_adapter(finished, tiny, tmp_path):
    first = tg.core.read_tensors(finished.out / "adapter")
    assert finished.lean == "exact"
    kept = {"exact": finished.saved_bytes}
    for level in ("checkpoint", "off"):
        result = train(tiny(out=tmp_path / level, lean=level), progress=False)
        assert all(torch.equal(v, first[k]) for k, v in tg.core.read_tensors(result.out / "adapter").items())
        kept[level] = result.saved_bytes
    assert kept["exact"] < 0.5 * kept["off"]


def test_what_a_batch_keeps_is_what_is_foretold(finished):
    model = create_backbone("test_resnet", pretrained=False, image_size=32)
    plan = tg.plan(model, "conv-adapter", 32, num_classes=3, batch=16)
    assert finished.saved_bytes == pytest.approx(plan.saved["exact"], rel=0.05)


def test_a_rounded_backbone_trains_float32_and_its_adapter_belongs_to_the_stored_one(finished, tiny, tmp_path):
    result = train(tiny(out=tmp_path / "run", frozen_dtype="bf16"), progress=False)
    assert result.frozen_dtype == "bf16"
    assert result.accuracy > 0.6
    assert result.saved_bytes < 0.6 * finished.saved_bytes
    assert {t.dtype for t in tg.core.read_tensors(result.out / "adapter").values()} == {torch.float32}
    state = read_checkpoint(result.out / "checkpoints" / "last.ckpt")
    moments = [v for s in state["optimizer_states"][0]["state"].values() for v in s.values() if torch.is_tensor(v)]
    assert {t.dtype for t in moments} == {torch.float32}
    scores = evaluate(result.out, device="cpu")  # the float32 backbone, by its fingerprint
    assert scores.confusion == result.confusion


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_dtype": "bf16", "precision": "32"}, "leave precision out"),
        ({"frozen_dtype": "bf16", "precision": "16-mixed"}, "computes in bf16"),
        ({"frozen_dtype": "fp16", "precision": "bf16-mixed"}, "computes in fp16"),
        ({"frozen_dtype": "fp16"}, "needs a GPU; use frozen_dtype=bf16"),
    ],
)
def test_types_that_contradict_each_other_are_one_line_and_leave_no_folder(tiny, tmp_path, changes, message):
    with pytest.raises(GraftError, match=message) as error:
        train(tiny(out=tmp_path / "run", **changes), progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_of_before_the_levels_is_read_and_resumed_as_it_was(finished, tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    (out / "summary.json").unlink()
    settings = yaml.safe_load((out / "config.yaml").read_text())
    for name in ("fold", "frozen_dtype"):
        del settings[name]
    settings |= {"lean": True, "channels_last": True, "precision": "32", "out": str(out)}
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    assert read_config(out / "config.yaml").lean == "exact"
    resumed = train(tiny(out=out), resume=True, progress=False)
    assert resumed.confusion == finished.confusion
    assert resumed.saved_bytes is None


def test_a_summary_of_before_the_levels_is_read(finished, tmp_path):
    record = json.loads((finished.out / "summary.json").read_text())
    for name in ("lean", "frozen_dtype", "saved_bytes"):
        del record[name]
    (tmp_path / "summary.json").write_text(json.dumps(record))
    assert read_result(tmp_path / "summary.json").saved_bytes is None


def test_half_precision_on_the_processor_is_one_line(tiny, tmp_path):
    with pytest.raises(GraftError, match="'16-mixed' needs a GPU"):
        train(tiny(out=tmp_path / "run", precision="16-mixed"), progress=False)


def test_an_interrupt_stays_an_interrupt_and_the_run_can_be_resumed(finished, tiny, tmp_path, monkeypatch):
    step, handler = ClassificationTask.training_step, signal.getsignal(signal.SIGINT)

    def interrupted(self, batch, batch_idx):
        if self.global_step == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    config = tiny(out=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClassificationTask, "training_step", interrupted)
        train(config, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = train(config, resume=True, progress=False)
    first = tg.core.read_tensors(finished.out / "adapter")
    assert all(torch.equal(v, first[k]) for k, v in tg.core.read_tensors(resumed.out / "adapter").items())


def test_a_disk_that_fills_up_outside_a_checkpoint_is_one_line(tiny, tmp_path, monkeypatch):
    def full(self, batch, batch_idx):
        raise OSError(errno.ENOSPC, "No space left on device", "events.out")

    monkeypatch.setattr(ClassificationTask, "training_step", full)
    with pytest.raises(GraftError, match=r"cannot write events\.out: No space left.*resume"):
        train(tiny(out=tmp_path / "run"), progress=False)


def test_too_little_memory_says_what_to_lower(tiny, tmp_path, monkeypatch):
    def exhausted(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ClassificationTask, "training_step", exhausted)
    with pytest.raises(GraftError, match="lower batch_size"):
        train(tiny(out=tmp_path / "run"), progress=False)


def test_resuming_a_finished_run_returns_its_result(finished, tiny):
    assert train(tiny(out=finished.out), resume=True, progress=False) == finished


def test_resuming_with_another_setting_names_it(finished, tiny):
    with pytest.raises(GraftError, match=r"lr was 0\.01 in .* and is 0\.5 now"):
        train(tiny(out=finished.out, lr=0.5), resume=True, progress=False)


def test_resuming_where_nothing_is_starts_a_run(tiny, tmp_path):
    assert train(tiny(out=tmp_path / "run", epochs=1), resume=True, progress=False).epochs == 1


def test_a_run_without_out_gets_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data="sample:animals", backbone="resnet18", method="conv-adapter[reduction=8]")
    first = run_folder(config)
    assert str(first.path) == "runs/sample-animals-resnet18-conv-adapter"
    first.create(config, resume=False)
    assert run_folder(config).path.name == "sample-animals-resnet18-conv-adapter-2"
    with pytest.raises(GraftError, match="out=FOLDER"):
        run_folder(config, resume=True)


def test_the_written_settings_are_yaml_with_comments(finished):
    text = RunFolder(finished.out).config.read_text()
    assert "# peak learning rate of the adapter" in text
    assert yaml.safe_load(text)["method"] == "conv-adapter"


def test_unreadable_images_are_left_out_and_counted(pictures, tiny, tmp_path):
    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    (broken / "train" / "red" / "0.png").write_bytes(b"not an image")
    Image.new("L", (40, 40)).save(broken / "train" / "red" / "grey.png")
    result = train(tiny(out=tmp_path / "run", data=str(broken), epochs=1), progress=False)
    assert result.skipped == 1
    assert result.train_images == 48
