"""Which frames of a video, and which crops of a frame, make the clip: the samplers of ST-Adapter's official code.

Pure functions of numbers (linziyi96/st-adapter, commit b914b38); the published evaluations take the mean of the class
probabilities over the views, which are the starts in time times the crops in space. Rounding is Python's own, half to
even: with another rounding the published frames are missed by one.
"""

from __future__ import annotations

import random

from ..errors import GraftError


def uniform_frames(total: int, count: int, rng: random.Random | None = None) -> list[int]:
    """``count`` frames spread over the whole video: one from each of ``count`` equal segments.

    Args:
        total: Frames in the video.
        count: Frames of the clip.
        rng: For training: a random frame of each segment, its two ends included. None: the middle one.

    Returns:
        Indices in ascending order; a video of few frames repeats some.

    Raises:
        GraftError: There is no frame, or none is wanted.
    """
    _check(total=total, count=count)
    segment = (total - 1) / count
    ends = [(round(segment * i), round(segment * (i + 1))) for i in range(count)]
    return [(a + b) // 2 if rng is None else rng.randint(a, b) for a, b in ends]


def dense_frames(total: int, count: int, rate: int, rng: random.Random) -> list[int]:
    """For training: ``count`` frames, every ``rate``-th one, from a random start.

    A video shorter than that window starts at its first frame and repeats the last frame it comes to.

    Args:
        total: Frames in the video.
        count: Frames of the clip.
        rate: Distance between them.
        rng: Chooses the start.

    Raises:
        GraftError: A number below 1.
    """
    _check(total=total, count=count, rate=rate)
    window = (count - 1) * rate + 1
    start = rng.randint(0, max(total - window, 0))
    last = (total - 1 - start) // rate
    return [start + rate * min(i, last) for i in range(count)]


def dense_views(total: int, count: int, rate: int, views: int = 1) -> list[list[int]]:
    """For evaluation: ``views`` clips of ``count`` frames, every ``rate``-th one, spread over the video.

    A video shorter than the window is as if its last frame went on. One view stands in the middle.

    Args:
        total: Frames in the video.
        count: Frames of a clip.
        rate: Distance between them.
        views: Number of clips.

    Raises:
        GraftError: A number below 1.
    """
    _check(total=total, count=count, rate=rate, views=views)
    slide = max(total - ((count - 1) * rate + 1), 0)
    starts = [slide // 2] if views == 1 else [round(slide / (views - 1) * i) for i in range(views)]
    return [[min(start + rate * i, total - 1) for i in range(count)] for start in starts]


def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """The size (height, width) of a frame that is resized until its short side has ``side`` pixels.

    Raises:
        GraftError: A number below 1.
    """
    _check(height=height, width=width, side=side)
    if height <= width:
        return side, max(side, round(width * side / height))
    return max(side, round(height * side / width)), side


def spatial_crops(height: int, width: int, side: int, count: int = 1) -> list[tuple[int, int]]:
    """Corners (top, left) of the square crops for evaluation: the centre, or three along the long side.

    Args:
        height: Of the frame, resized.
        width: Of the frame, resized.
        side: Of the crops.
        count: 1 or 3.

    Raises:
        GraftError: Another number of crops, or a crop larger than the frame.
    """
    _check(height=height, width=width, side=side)
    if count not in (1, 3):
        raise GraftError(f"spatial_crops: count={count}; expected 1 (the centre) or 3 (along the long side)")
    if side > min(height, width):
        raise GraftError(f"spatial_crops: crops of {side} pixels do not fit a frame of {height} x {width}; resize it")
    down, right = height - side, width - side
    centre = (down // 2, right // 2)
    if count == 1:
        return [centre]
    if down > right:
        return [(top, centre[1]) for top in (0, centre[0], down)]
    return [(centre[0], left) for left in (0, centre[1], right)]


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise GraftError(f"frames: {name}={number}; expected at least 1")
