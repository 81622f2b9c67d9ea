import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchgraft.data import few_shot
from torchgraft.data.splits import hold_out, natural_key
from torchgraft.errors import GraftError

LABELS = [0, 1, 2] * 10


@given(shots=st.integers(1, 10), seed=st.integers(0, 50))
def test_few_shot_takes_the_same_number_of_every_class(shots, seed):
    chosen = few_shot(LABELS, shots, seed)
    assert len(set(chosen)) == len(chosen)
    assert [sum(LABELS[i] == k for i in chosen) for k in range(3)] == [shots] * 3
    assert chosen == few_shot(LABELS, shots, seed)


def test_few_shot_moves_with_the_seed():
    assert len({tuple(few_shot(LABELS, 3, seed)) for seed in range(10)}) > 5


def test_fewer_shots_are_among_more_shots_of_the_same_seed():
    for few, more in ((1, 2), (2, 4), (4, 8)):
        assert set(few_shot(LABELS, few, 5)) < set(few_shot(LABELS, more, 5))


def test_more_images_of_one_class_do_not_move_the_choice_in_another():
    longer = LABELS + [2] * 7
    assert [i for i in few_shot(LABELS, 4, 0) if LABELS[i] < 2] == [i for i in few_shot(longer, 4, 0) if longer[i] < 2]


def test_few_shot_refuses_what_it_cannot_draw():
    with pytest.raises(GraftError, match="at least 1"):
        few_shot(LABELS, 0, 0)
    with pytest.raises(GraftError, match="class 'b' has 1 training image, fewer than shots=2"):
        few_shot([0, 0, 1], 2, 0, classes=("a", "b"))


@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_hold_out_divides_every_class_and_leaves_both_sides_something(counts, fraction, seed):
    labels = [k for k, n in enumerate(counts) for _ in range(n)]
    stay, off = hold_out(labels, fraction, seed)
    assert sorted(stay + off) == list(range(len(labels)))
    for k, n in enumerate(counts):
        held = sum(labels[i] == k for i in off)
        assert 1 <= held <= n - 1
        assert abs(held - n * fraction) <= 1


def test_natural_order_counts_and_ignores_case_first():
    names = ["b", "a10", "A2", "a2", "a1b3", "a1b20", "007"]
    assert sorted(names, key=natural_key) == ["007", "a1b3", "a1b20", "A2", "a2", "a10", "b"]
