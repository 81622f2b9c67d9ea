"""The checks of ``bench compat``: ours pass, and a check can fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.cases import Case
from torchgraft.bench.compat import CHECKS, attempt, chosen, measure
from torchgraft.bench.mechanisms import by_hook, mechanisms, trained
from torchgraft.errors import GraftError


@pytest.mark.parametrize("level", ["exact", "recompute", "checkpoint", False])
@pytest.mark.parametrize("check", CHECKS)
def test_everything_goes_on_working_with_what_torchgraft_attaches(check: str, level: str | bool) -> None:
    assert attempt(check, Case("torchgraft", mechanisms(level)["torchgraft"])) == ""


def wrongly(model: nn.Module, example: Tensor) -> None:
    """A mechanism that gets the factors wrong."""
    by_hook(model, example)
    with torch.no_grad():
        for factor in trained(model):
            factor.mul_(3)


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_notices_wrong_values(check: str) -> None:
    assert attempt(check, Case("wrong", wrongly)).startswith(("AssertionError: values differ", "RuntimeError"))


@pytest.mark.parametrize(
    ("check", "mechanism", "reason"),
    [
        ("plain checkpoint", "wrapper", "keys are unknown"),
        ("plain checkpoint", "parametrize", "keys are unknown"),
        ("pickle", "parametrize", "state_dict"),
        ("deepcopy", "wrapper", ""),
        ("eager", "forward hook", ""),
    ],
)
def test_other_mechanisms_fail_where_they_are_known_to(check: str, mechanism: str, reason: str) -> None:
    (cell,) = [c for c in measure([check]) if c.mechanism == mechanism]
    assert reason in cell.reason and bool(reason) == bool(cell.reason)


def test_a_hook_that_is_registered_after_compiling_goes_unnoticed() -> None:
    assert attempt("attach after compile", Case("forward hook", by_hook))


def test_an_unknown_check_or_an_approximate_level_is_refused() -> None:
    with pytest.raises(GraftError, match=r"check 'export2': did you mean 'export'"):
        chosen(["export2"])
    with pytest.raises(GraftError, match=r"compact.*approximate"):
        measure(["eager"], level="compact")
    assert chosen(None) == list(CHECKS)
