"""The frames and crops of a clip; the tables are those of ST-Adapter's official code."""

from __future__ import annotations

import random

import pytest

from torchgraft.data.frames import dense_frames, dense_views, short_side, spatial_crops, uniform_frames
from torchgraft.errors import GraftError

UNIFORM = {
    8: [0, 1, 2, 3, 4, 4, 5, 6],
    33: [2, 6, 10, 14, 18, 22, 26, 30],
    50: [3, 9, 15, 21, 27, 34, 40, 46],
    100: [6, 18, 31, 43, 56, 68, 80, 93],
}
DENSE_STARTS = {100: [0, 0, 0], 250: [0, 68, 137], 300: [0, 94, 187]}


@pytest.mark.parametrize("total", UNIFORM)
def test_uniform_evaluation_takes_the_published_frames(total: int) -> None:
    assert uniform_frames(total, 8) == UNIFORM[total]


@pytest.mark.parametrize("total", DENSE_STARTS)
def test_dense_views_start_where_the_published_ones_do(total: int) -> None:
    assert [view[0] for view in dense_views(total, 8, 16, 3)] == DENSE_STARTS[total]


def test_a_single_dense_view_stands_in_the_middle_of_the_video() -> None:
    assert dense_views(250, 8, 16) == [[68 + 16 * i for i in range(8)]]


def test_a_dense_view_of_a_short_video_goes_on_with_its_last_frame() -> None:
    assert dense_views(100, 8, 16) == [[0, 16, 32, 48, 64, 80, 96, 99]]


def test_a_dense_training_clip_of_a_short_video_repeats_the_last_frame_it_comes_to() -> None:
    assert dense_frames(100, 8, 16, random.Random(0)) == [0, 16, 32, 48, 64, 80, 96, 96]
    assert dense_frames(1, 3, 4, random.Random(0)) == [0, 0, 0]


def test_dense_training_clips_reach_from_the_first_frame_to_the_last_and_never_beyond() -> None:
    rng = random.Random(0)
    clips = [dense_frames(20, 3, 8, rng) for _ in range(200)]
    assert {clip[0] for clip in clips} == {0, 1, 2, 3}
    assert all(clip == [clip[0], clip[0] + 8, clip[0] + 16] for clip in clips)


def test_uniform_training_clips_draw_from_each_segment_with_both_of_its_ends() -> None:
    rng = random.Random(0)
    clips = [uniform_frames(33, 8, rng) for _ in range(300)]
    assert [{clip[i] for clip in clips} for i in range(8)] == [set(range(4 * i, 4 * i + 5)) for i in range(8)]
    assert all(clip == sorted(clip) for clip in clips)


def test_the_same_seed_draws_the_same_clip() -> None:
    assert uniform_frames(100, 8, random.Random(3)) == uniform_frames(100, 8, random.Random(3))


@pytest.mark.parametrize(
    ("size", "resized"), [((240, 320), (224, 299)), ((320, 240), (299, 224)), ((50, 50), (224, 224))]
)
def test_a_frame_is_resized_by_its_short_side(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert short_side(*size, 224) == resized


def test_crops_are_the_centre_or_lie_along_the_long_side() -> None:
    assert spatial_crops(224, 299, 224) == [(0, 37)]
    assert spatial_crops(224, 299, 224, 3) == [(0, 0), (0, 37), (0, 75)]
    assert spatial_crops(299, 224, 224, 3) == [(0, 0), (37, 0), (75, 0)]
    assert spatial_crops(224, 224, 224, 3) == [(0, 0)] * 3


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: uniform_frames(0, 8), "total=0; expected at least 1"),
        (lambda: uniform_frames(8, 0), "count=0"),
        (lambda: dense_views(8, 8, 16, 0), "views=0"),
        (lambda: dense_frames(8, 8, 0, random.Random(0)), "rate=0"),
        (lambda: spatial_crops(224, 224, 224, 2), "count=2; expected 1"),
        (lambda: spatial_crops(100, 300, 224), "do not fit a frame of 100 x 300"),
    ],
)
def test_impossible_numbers_are_one_line_errors(call, text: str) -> None:
    with pytest.raises(GraftError, match=text) as error:
        call()
    assert "\n" not in str(error.value)
