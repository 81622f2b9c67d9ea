from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import torchgraft as tg
from torchgraft.errors import GraftError
from torchgraft.tasks import evaluate, load_classifier, predict
from torchgraft.tasks.inference import mistakes


@pytest.fixture
def adapter(finished, tmp_path):
    """A copy of the finished adapter that a test may damage."""
    shutil.copytree(finished.out / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_evaluating_the_saved_adapter_gives_the_result_of_training(finished, pictures):
    scores = evaluate(finished.out, str(pictures), device="cpu")
    assert scores.part == "test"
    assert scores.confusion == finished.confusion
    assert scores.accuracy == finished.accuracy
    assert scores.loss == pytest.approx(finished.loss, rel=1e-6)
    assert [m.id for m in scores.worst] == [m.id for m in finished.worst]
    assert evaluate(finished.out / "adapter", device="cpu").confusion == finished.confusion


def test_the_batch_size_changes_nothing_but_speed(finished):
    few, many = (evaluate(finished.out, batch_size=size, device="cpu") for size in (5, 64))
    assert few.confusion == many.confusion
    assert few.loss == pytest.approx(many.loss, rel=1e-5)


def test_other_parts_can_be_scored(finished):
    assert evaluate(finished.out, part="val", device="cpu").accuracy == pytest.approx(finished.val_accuracy)
    assert evaluate(finished.out, part="train", device="cpu").n == 48
    with pytest.raises(GraftError, match=r"part 'tset'.*'test'"):
        evaluate(finished.out, part="tset", device="cpu")


def test_labels_follow_the_class_names_and_not_their_order(finished, pictures, tmp_path):
    """A data set with fewer classes numbers them differently."""
    for part in ("train", "test"):
        for name in ("red", "green"):
            shutil.copytree(pictures / part / name, tmp_path / "two" / part / name)
    scores = evaluate(finished.out, str(tmp_path / "two"), device="cpu")
    assert scores.classes == ["blue", "green", "red"]
    assert scores.per_class[0] is None
    assert scores.per_class[1:] == finished.per_class[1:]


def test_a_class_that_the_adapter_does_not_know_is_an_error(finished, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "more")
    (tmp_path / "more" / "test" / "red").rename(tmp_path / "more" / "test" / "reed")
    (tmp_path / "more" / "train" / "red").rename(tmp_path / "more" / "train" / "reed")
    (tmp_path / "more" / "val" / "red").rename(tmp_path / "more" / "val" / "reed")
    with pytest.raises(GraftError, match="'reed'; did you mean 'red'"):
        evaluate(finished.out, str(tmp_path / "more"), device="cpu")


def test_predictions_agree_with_the_evaluation_and_are_sorted_probabilities(finished, pictures):
    files = sorted((pictures / "test").rglob("*.png"))
    answers = predict(finished.out / "adapter", files, device="cpu", batch_size=5)
    assert [answer.path for answer in answers] == [str(file) for file in files]
    hits = sum(answer.top[0][0] == file.parent.name for answer, file in zip(answers, files, strict=True))
    assert hits / len(files) == pytest.approx(finished.accuracy)
    for answer in answers:
        shares = [share for _, share in answer.top]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert shares == sorted(shares, reverse=True)
    assert all(len(answer.top) == 2 for answer in predict(finished.out, files[:3], top=2, device="cpu"))


def test_a_folder_stands_for_the_images_below_it(finished, pictures):
    answers = predict(finished.out, [pictures / "test"], device="cpu")
    assert len(answers) == 24
    assert [a.path for a in answers] == sorted(a.path for a in answers)


def test_an_unreadable_image_is_reported_and_the_others_go_on(finished, pictures, tmp_path):
    good = next((pictures / "test").rglob("*.png"))
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    answers = predict(finished.out, [tmp_path / "broken.jpg", good, tmp_path / "missing.png"], device="cpu")
    assert [bool(answer.error) for answer in answers] == [True, False, True]
    assert answers[0].top == []
    assert len(answers[1].top) == 3
    assert predict(finished.out, [tmp_path / "broken.jpg"], device="cpu")[0].error


def test_grey_palette_and_transparent_images_are_read(finished, tmp_path):
    for mode in ("L", "P", "RGBA", "I;16"):
        Image.fromarray(np.full((20, 30), 90, np.uint16 if mode == "I;16" else np.uint8)).convert(mode).save(
            tmp_path / f"{mode.replace(';', '')}.png"
        )
    assert all(answer.error is None for answer in predict(finished.out, [tmp_path], device="cpu"))


def test_predicting_nothing_is_an_error(finished, tmp_path):
    with pytest.raises(GraftError, match="no image files"):
        predict(finished.out, [tmp_path], device="cpu")
    with pytest.raises(GraftError, match="top: 0"):
        predict(finished.out, ["a.png"], top=0, device="cpu")


def test_a_folder_without_an_adapter_says_what_to_name(finished, tmp_path):
    with pytest.raises(GraftError, match="does not exist"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(GraftError, match=r"holds no adapter_config\.json"):
        load_classifier(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(GraftError, match="has not finished"):
        load_classifier(tmp_path)


def test_an_adapter_without_a_task_is_refused(adapter):
    (adapter / "task.json").unlink()
    with pytest.raises(GraftError, match=r"task\.json is missing"):
        load_classifier(adapter)


@pytest.mark.parametrize("entry", ["classes", "backbone", "transform"])
def test_a_damaged_task_file_names_the_missing_entry(adapter, entry):
    task = json.loads((adapter / "task.json").read_text())
    del task[entry]
    (adapter / "task.json").write_text(json.dumps(task))
    with pytest.raises(GraftError, match=f"no entry '{entry}'"):
        load_classifier(adapter, device="cpu")


def test_weights_that_are_gone_are_an_error_that_names_them(adapter, tmp_path):
    task = json.loads((adapter / "task.json").read_text())
    task["backbone"]["weights"] = str(tmp_path / "gone.safetensors")
    (adapter / "task.json").write_text(json.dumps(task))
    with pytest.raises(GraftError, match=r"gone\.safetensors"):
        load_classifier(adapter, device="cpu")


def test_another_backbone_is_refused(adapter):
    task = json.loads((adapter / "task.json").read_text())
    task["backbone"]["seed"] = 1
    (adapter / "task.json").write_text(json.dumps(task))
    with pytest.raises(GraftError, match="other weights"):
        load_classifier(adapter, device="cpu")


def test_the_classifier_can_be_used_from_python(finished, pictures):
    classifier = load_classifier(finished.out, device="cpu")
    file = next((pictures / "test").rglob("*.png"))
    logits = classifier.logits(classifier.transform(Image.open(file))[None])
    assert logits.shape == (1, 3)
    answer = predict(finished.out, [file], device="cpu")[0]
    assert classifier.classes[int(logits.argmax())] == answer.top[0][0]
    assert isinstance(classifier.adapter, tg.Adapter)


def test_mistakes_are_listed_from_the_most_confident_one():
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [5.0, 0.0]])
    found = mistakes(logits, torch.tensor([1, 0, 0, 0]), ["a", "b", "c", "d"], ["x", "y"])
    assert [(m.id, m.true, m.predicted) for m in found] == [("a", "y", "x"), ("c", "x", "y"), ("b", "x", "y")]
    assert found[0].confidence == pytest.approx(1 / (1 + np.exp(-3)), rel=1e-5)
