from __future__ import annotations

import io
import warnings

import matplotlib
import numpy as np
import pytest
from PIL import Image

from torchgraft.errors import GraftError
from torchgraft.tasks.plots import PAGE_DARK, confusion, curves, image_grid, save, shortened, svg

HISTORY = [
    {"train_loss": 1.5, "val_loss": 1.6, "train_accuracy": 0.3, "val_accuracy": 0.25},
    {"train_loss": 0.9, "val_loss": float("nan"), "train_accuracy": 0.6, "val_accuracy": 0.55},
    {"train_loss": 0.4, "val_loss": 1.1, "train_accuracy": 0.9, "val_accuracy": 0.5},
]


def _lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_curves_show_every_finite_value_at_its_epoch():
    loss, accuracy = curves(HISTORY).axes
    assert _lines(loss) == {"training": ([1, 2, 3], [1.5, 0.9, 0.4]), "validation": ([1, 3], [1.6, 1.1])}
    assert _lines(accuracy)["validation"] == ([1, 2, 3], [0.25, 0.55, 0.5])
    assert "55.0%, epoch 2" in accuracy.get_title(loc="left")


def test_curves_of_a_run_that_measured_nothing_are_empty_and_not_an_error():
    assert all(not axes.lines for axes in curves([{"train_loss": None}]).axes)


def test_confusion_writes_the_counts_and_colours_by_the_share_of_the_true_class():
    axes = confusion([[3, 1], [0, 0]], ["a", "b"]).axes[0]
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {((0, 0), "3"), ((1, 0), "1")}
    assert np.allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 0]])


def test_many_classes_are_drawn_without_names_or_counts():
    axes = confusion(np.eye(60, dtype=int).tolist(), [f"class {i}" for i in range(60)]).axes[0]
    assert not axes.texts
    assert "class 3" not in [label.get_text() for label in axes.get_yticklabels()]


def test_class_names_with_dollars_and_line_breaks_are_drawn_as_they_are(tmp_path):
    names = ["$x^2$", "cost $5\nor more"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(confusion([[1, 0], [1, 2]], names), tmp_path / "matrix.png")
    labels = [t.get_text() for t in confusion([[1, 0], [1, 2]], names).axes[0].get_yticklabels()]
    assert labels == ["$x^2$", "cost $5 or more"]


def test_pictures_keep_their_proportions_and_captions():
    images = [Image.new("RGB", (64, 32), "red"), Image.new("L", (10, 40)), Image.new("RGB", (900, 900))]
    figure = image_grid(images, ["a", "b", "c"], ["1", "2", "3"], title="all")
    assert [axes.images[0].get_array().shape[:2] for axes in figure.axes] == [(32, 64), (40, 10), (448, 448)]
    assert {"a", "b", "c", "1", "2", "3", "all"} <= {text.get_text() for text in figure.texts}


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    save(curves(HISTORY, theme=PAGE_DARK), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def test_the_same_picture_has_the_same_bytes_and_loads_nothing():
    first, second = svg(curves(HISTORY)), svg(curves(HISTORY))
    assert first == second
    assert b"<image" not in first and b"font-family" not in first


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GraftError, match="cannot write"):
        save(curves(HISTORY), tmp_path / "file" / "x.png")


def test_a_png_has_the_size_that_the_resolution_says(tmp_path):
    small, large = (
        save(curves(HISTORY), tmp_path / "s.png", dpi=50),
        save(curves(HISTORY), tmp_path / "l.png", dpi=100),
    )
    widths = [Image.open(io.BytesIO(path.read_bytes())).width for path in (small, large)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=3)


@pytest.mark.parametrize(
    ("text", "length", "short"),
    [("short", 10, "short"), ("a very long name.png", 12, "a very l…png"), ("a\n b", 9, "a b")],
)
def test_long_names_lose_their_middle(text, length, short):
    assert shortened(text, length) == short
