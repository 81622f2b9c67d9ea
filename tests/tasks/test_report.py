from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from torchgraft.data.dataset import ArrayPictures, ImageDataset
from torchgraft.errors import GraftError
from torchgraft.tasks import Mistake, RunResult
from torchgraft.tasks.report import write_report

NASTY = '<script>alert("x")</script>'
CLASSES = ["cat", NASTY, "a & b"]
CONFUSION = [[8, 2, 0], [1, 9, 0], [0, 0, 0]]


def make_result(out: Path, **changes: object) -> RunResult:
    values: dict = {
        "out": out,
        "data": f"photos/{NASTY}",
        "backbone": "test_convnext",
        "method": "conv-adapter[reduction=4]",
        "accuracy": 0.85,
        "top5": None,
        "loss": 0.5,
        "part": "test",
        "val_accuracy": 0.8,
        "classes": CLASSES,
        "per_class": [0.8, 0.9, None],
        "confusion": CONFUSION,
        "worst": [Mistake(f"{NASTY}/1.png", "cat", NASTY, 0.987), Mistake("gone.png", NASTY, "cat", 0.5)],
        "trainable_params": 1234,
        "adapter_params": 1200,
        "head_params": 34,
        "backbone_params": 48_000,
        "adapter_bytes": 61_234,
        "train_images": 60,
        "val_images": 20,
        "test_images": 20,
        "skipped": 0,
        "epochs": 2,
        "steps": 8,
        "best_epoch": 2,
        "seconds": 83.0,
        "images_per_second": 12.0,
        "peak_rss_mb": 700.0,
        "peak_cuda_mb": None,
        "stopped_early": False,
        "history": [
            {"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.4},
            {"epoch": 2, "train_loss": 0.5, "val_loss": 0.7, "train_accuracy": 0.9, "val_accuracy": 0.8},
        ],
        **changes,
    }
    return RunResult(**values)


class Page(HTMLParser):
    """Tags, the addresses they load, and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "srcset", "href", "data"}]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    (out / "config.yaml").write_text(f"data: photos\nlr: 0.005\ninclude: ['{NASTY}']\n")
    (out / "environment.json").write_text('{"platform": "Linux", "versions": {"torch": "2.14.1"}}')
    held_out = ImageDataset(ArrayPictures(np.zeros((1, 20, 30), np.uint8)), [0], [f"{NASTY}/1.png"])
    write_report(make_result(out), out, held_out=held_out)
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_from_outside_and_runs_nothing(page):
    assert page.loads and all(address.startswith("data:image/") for address in page.loads)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags


def test_names_from_the_data_are_text_and_never_markup(page):
    assert page.text.count(NASTY) >= 5
    assert "alert" not in "".join(page.tags)


def test_the_headline_numbers_are_there(page):
    for words in (
        "85.0%",
        "conv-adapter[reduction=4] on test_convnext",
        "61 kB",
        "1 min 23 s",
        "1,200",
        "2.5%",
    ):
        assert words in page.text, words


def test_every_class_has_its_accuracy_and_what_it_is_taken_for(page):
    words = re.sub(r"\s+", " ", page.text)
    assert f"cat 10 8 80.0% {NASTY} (2)".replace(" ", "") in words.replace(" ", "")
    assert "a & b" in words and "none" in words


def test_the_worst_mistakes_have_pictures_where_the_image_is_still_there(page, folder):
    assert "98.7%" in page.text and "no picture" in page.text
    jpegs = [a for a in page.loads if a.startswith("data:image/jpeg")]
    assert len(jpegs) == 1
    assert base64.b64decode(jpegs[0].split(",")[1]).startswith(b"\xff\xd8")


def test_plots_are_there_for_light_and_for_dark_pages(page, folder):
    plots = [a for a in page.loads if a.startswith("data:image/svg+xml")]
    assert len(plots) == 4 and len(set(plots)) == 4
    assert "prefers-color-scheme: dark" in (folder / "report.html").read_text(encoding="utf-8")


def test_configuration_and_environment_are_on_the_page(page):
    assert "0.005" in page.text and "versions.torch" in page.text and "2.14.1" in page.text


def test_a_run_without_mistakes_history_or_files_beside_it_still_has_a_page(tmp_path):
    result = make_result(tmp_path, worst=[], history=[], part="val")
    text = Page(write_report(result, tmp_path).read_text(encoding="utf-8")).text
    assert "every image" in text and "no test part" in text


def test_a_damaged_environment_file_does_not_cost_the_page(tmp_path):
    (tmp_path / "environment.json").write_text('{"half": ')
    (tmp_path / "config.yaml").write_text("[1, 2")
    assert write_report(make_result(tmp_path), tmp_path).is_file()


def test_many_classes_show_the_hardest_first(tmp_path):
    k = 120
    confusion = [[0] * k for _ in range(k)]
    for i in range(k):
        confusion[i][i] = 10
    confusion[77][77], confusion[77][3] = 1, 9
    result = make_result(tmp_path, classes=[f"class {i}" for i in range(k)], confusion=confusion, worst=[])
    text = Page(write_report(result, tmp_path).read_text(encoding="utf-8")).text
    rows = re.findall(r"class (\d+)10\d+", text)
    assert rows[0] == "77" and len(rows) == 100


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(GraftError, match=r"report\.html"):
        write_report(make_result(tmp_path), tmp_path)
