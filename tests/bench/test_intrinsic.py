"""The local intrinsic dimension: the random subspace, and what is measured with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.bench.intrinsic import Fastfood, InSubspace, hadamard, intrinsic_dimension
from torchgraft.errors import GraftError

K = 8
"""Conditions that the task of these tests puts on the module."""


class Sums(nn.Module):
    """K outputs, each the sum of its own 32 weights: what solves a task has codimension K among 256 weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 32, bias=False)
        self.layer = nn.Linear(32, K, bias=False)
        nn.init.constant_(self.stem.weight, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.stem(x))


def task() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    batch = torch.ones(1, 4), torch.randn(1, K, generator=torch.Generator().manual_seed(1))
    return [batch], [batch]


def met(out: Tensor, target: Tensor) -> Tensor:
    """Which conditions are met."""
    return ((out - target).abs() < 0.05).float()


def measured(model: nn.Module, **options: object) -> object:
    known = {"ds": [4, 7, 8, 12, 16], "loss": nn.functional.mse_loss, "score": met, "lr": 0.1, "steps": 250}
    return intrinsic_dimension(model, "layer", task(), **{**known, **options})  # type: ignore[arg-type]


def test_as_many_directions_are_needed_as_there_are_conditions() -> None:
    found = measured(Sums())
    assert found.reference == 1.0
    assert K <= found.dimension <= 2 * K
    assert all(score < 0.9 for d, score in found.scores.items() if d < K)


def test_the_model_is_left_as_it_was_and_the_seed_fixes_the_result() -> None:
    model = Sums().train()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    random = torch.get_rng_state()
    first = measured(model, ds=[2, 4], steps=80)
    assert model.training
    assert type(model) is Sums
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert measured(model, ds=[2, 4], steps=80) == first
    assert first.dimension is None


def test_a_head_is_trained_along_with_the_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(40, 6)
    data = [(x, (x[:, 0] > 0).long())]
    found = intrinsic_dimension(model, "2", (data, data), ds=[1, 4], num_classes=2, lr=0.05, steps=100)
    assert found.reference > 0.9
    assert found.dimension in (1, 4)


def test_the_transform_is_orthonormal_and_its_own_inverse() -> None:
    x = torch.randn(3, 16)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close(hadamard(x).norm(dim=1), x.norm(dim=1))


def test_directions_have_unit_norm_on_average_and_are_all_there() -> None:
    z = nn.Parameter(torch.zeros(6))
    part = Fastfood((40, 50), z, 2000, torch.Generator().manual_seed(0))
    columns = torch.autograd.functional.jacobian(lambda v: torch.func.functional_call(part, {"z": v}), z)
    matrix = columns.reshape(2000, 6)
    assert torch.linalg.matrix_rank(matrix) == 6
    assert 0.8 < float(matrix.norm(dim=0).mean()) < 1.2


def test_all_parameters_of_the_module_move_by_one_vector() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), nn.Linear(3, 2))
    adapter = tg.attach(model, InSubspace("1", 5))
    assert adapter.num_parameters() == 5
    assert {site.path for site in adapter.sites} == {"1.0", "1.1"}


@pytest.mark.parametrize("ds", [[], [0, 1], [4, 2], [2, 2]])
def test_dimensions_that_do_not_rise_are_refused(ds: list[int]) -> None:
    with pytest.raises(GraftError, match="intrinsic_dimension: ds="):
        measured(Sums(), ds=ds)


def test_a_reference_that_learns_nothing_is_no_measure() -> None:
    with pytest.raises(GraftError, match="training all of 'layer' reaches a score of 0 in 1 steps"):
        measured(Sums(), steps=1)


def test_a_module_that_is_not_there_or_holds_nothing_is_refused() -> None:
    with pytest.raises(GraftError, match="nowhere"):
        intrinsic_dimension(Sums(), "nowhere", task(), ds=[1])
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, K))
    with pytest.raises(GraftError, match=r"in-subspace: '1' \(ReLU\) holds no parameters"):
        tg.attach(model, InSubspace("1", 2))
