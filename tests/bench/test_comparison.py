from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from torchgraft.bench.comparison import Bar, comparison

BARS = [Bar("linear probe", 0.535, "trains 7,686"), Bar("Conv-Adapter", 0.87, "trains 4.5%", highlight=True)]
SAMPLES = [(Image.new("RGB", (112, 112)), str(k)) for k in range(8)]


@pytest.fixture
def figure():
    return comparison(BARS, SAMPLES, title="T", question="How many?", chance=1 / 6, footer="small print")


def test_bars_are_as_long_as_the_accuracies_in_the_order_given(figure):
    bars = figure.axes[-1].patches
    assert [bar.get_width() for bar in bars] == [0.535, 0.87]
    assert bars[0].get_y() > bars[1].get_y()


def test_every_bar_says_its_accuracy_name_and_cost(figure):
    texts = {text.get_text() for text in figure.axes[-1].texts}
    assert {"53.5%", "87.0%", "linear probe", "Conv-Adapter", "trains 7,686", "guessing: 17%"} <= texts


def test_at_most_six_samples_are_shown_with_their_answers(figure):
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.texts[0].get_text() for axes in shown] == ["0", "1", "2", "3", "4", "5"]


def test_no_text_leaves_the_picture_or_lies_over_another_one(figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    width, height = figure.bbox.width, figure.bbox.height
    assert all(b.x0 >= 0 and b.x1 <= width and b.y0 >= 0 and b.y1 <= height for b in boxes)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
