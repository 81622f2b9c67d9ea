from __future__ import annotations

import pytest

from torchgraft.tasks.quantities import duration, interval, percent, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (612_345, "612 kB"), (999_960, "1.0 MB"),
     (13_484_032, "13 MB"), (2.5e9, "2.5 GB")],
)  # fmt: skip
def test_bytes_are_written_in_decimal_units(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.44, "8.4 s"), (59.96, "1 min 00 s"), (83, "1 min 23 s"), (7500, "2 h 05 min")]
)
def test_durations_carry_into_the_next_unit(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0%"), (1, "100.0%"), (0.0452, "4.5%"), (0.00228, "0.23%"), (0.00004, "0.004%")]
)
def test_small_shares_keep_a_significant_digit(share, text):
    assert percent(share) == text


def test_the_interval_is_wilsons():
    # A worked example of R. G. Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263.
    low, high = interval(81 / 263, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


def test_the_interval_stays_inside_zero_and_one_and_is_wide_without_data():
    assert interval(1.0, 20)[1] == 1.0 and interval(1.0, 20)[0] < 0.9
    assert interval(0.5, 0) == (0.0, 1.0)
