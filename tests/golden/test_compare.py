"""The comparison rules reject what they must reject: without this, every golden test could pass in vain."""

from __future__ import annotations

import pytest
import torch

from .compare import Tolerance, count_differences, difference, gradient_differences, value_differences

TOLERANCE = Tolerance(abs=1e-3, rel=1e-2, grad_abs=2e-3, grad_rel=0.0)


@pytest.mark.parametrize(("error", "equal"), [(0.02, True), (0.0215, False), (-0.0215, False)])
def test_the_allowed_error_is_absolute_plus_relative_to_the_largest_expected_element(error: float, equal: bool) -> None:
    expected = torch.tensor([0.0, -2.0, 1.0])  # allowed: 1e-3 + 1e-2 * 2 = 0.021
    ours = expected + torch.tensor([error, 0.0, 0.0])
    assert (difference("x", ours, expected, absolute=1e-3, relative=1e-2) is None) is equal


def test_a_difference_names_the_worst_element_and_both_values() -> None:
    line = difference("x", torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]), absolute=0.1, relative=0.0)
    assert line is not None
    assert all(part in line for part in ("x: element 1", "5", "2", "1 of 2"))


def test_another_shape_dtype_or_a_value_that_is_not_finite_is_a_difference() -> None:
    expected = torch.ones(2, 3)
    for ours in (torch.ones(3, 2), torch.ones(2, 3).double(), torch.full((2, 3), float("nan"))):
        assert difference("x", ours, expected, absolute=1.0, relative=1.0)


def test_integers_must_be_identical() -> None:
    expected = torch.tensor([1, 2, 3])
    assert difference("x", expected.clone(), expected, absolute=9.0, relative=9.0) is None
    assert difference("x", torch.tensor([1, 2, 4]), expected, absolute=9.0, relative=9.0)


def test_both_sides_must_hold_the_same_outputs() -> None:
    one, two = {"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}
    assert value_differences(one, two, TOLERANCE) == ["b: missing from ours"]
    assert value_differences(two, one, TOLERANCE) == ["b: not in the reference"]
    assert value_differences(two, two, TOLERANCE) == []


def test_a_gradient_that_was_never_computed_counts_as_zeros() -> None:
    small, large = {"w": torch.full((2,), 1e-3)}, {"w": torch.full((2,), 1e-2)}
    assert gradient_differences({"w": None}, small, TOLERANCE) == []
    assert len(gradient_differences({"w": None}, large, TOLERANCE)) == 1
    assert gradient_differences({}, small, TOLERANCE) == ["grad w: ours has no such tensor"]


def test_counts_that_the_reference_leaves_open_are_not_compared() -> None:
    ours = {"param_count": 10, "adapter_count": 4}
    assert count_differences(ours, {"param_count": 10, "adapter_count": None}) == []
    assert count_differences(ours, {"param_count": 11, "adapter_count": 4}) == ["param_count: 10, expected 11"]


def test_the_total_counts_the_dead_parameters_of_the_official_module() -> None:
    ours = {"param_count": 10, "adapter_count": 4}
    assert count_differences(ours, {"param_count": 13, "adapter_count": 4}, dead=3) == []
    assert count_differences(ours, {"param_count": 13, "adapter_count": 7}, dead=3) == []
    assert len(count_differences(ours, {"param_count": 10, "adapter_count": 5}, dead=3)) == 2
