from __future__ import annotations

from torchgraft.bench.goals import Goal


def test_a_goal_is_an_upper_bound_that_may_be_reached() -> None:
    assert Goal("a", 1.0, 1.0).met and not Goal("a", 1.01, 1.0).met
    assert not Goal("a", float("nan"), 1.0).met
    assert Goal("a", 2.0, 1.0, advisory=True).to_dict() == {
        "name": "a", "value": 2.0, "limit": 1.0, "advisory": True, "met": False,
    }  # fmt: skip
