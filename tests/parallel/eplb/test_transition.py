import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.parallel.eplb import count_moves, walk


def plans(seed, layers, experts, spare):
    """Two valid plans."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(np.append(np.arange(experts), rng.integers(0, experts, spare)))
        for _ in range(2 * layers)
    ]
    return np.array(rows).reshape(2, layers, experts + spare)


@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 3),
    experts=st.integers(1, 12),
    spare=st.integers(0, 6),
    max_moves=st.integers(2, 20),
)
@settings(max_examples=300, deadline=None)
def test_every_step_is_valid_small_and_nearer(seed, layers, experts, spare, max_moves):
    current, target = plans(seed, layers, experts, spare)
    before, steps = current, walk(current, target, max_moves)
    for plan in steps:
        assert all(set(row) == set(range(experts)) for row in plan)
        assert count_moves(plan, before).max() <= max_moves
        left, left_before = count_moves(plan, target), count_moves(before, target)
        assert ((left < left_before) | (left_before == 0)).all()
        before = plan
    np.testing.assert_array_equal(before, target)


def test_replicas_move_without_a_detour():
    current = np.array([[0, 1, 2, 0, 1, 2, 0, 0]])
    target = np.array([[0, 1, 2, 1, 2, 0, 1, 1]])
    assert len(walk(current, target, 2)) == 3  # five slots differ
    assert len(walk(current, target, 5)) == 1


def test_a_cycle_without_spare_slots_turns_at_once_or_in_swaps():
    current, target = np.arange(6)[None], np.roll(np.arange(6), 1)[None]
    assert len(walk(current, target, 6)) == 1
    assert [count_moves(plan, target)[0] for plan in walk(current, target, 2)] == [5, 4, 3, 2, 0]


def test_nothing_to_change_is_no_step():
    assert walk(np.arange(4)[None], np.arange(4)[None], 2) == []


@pytest.mark.parametrize(
    ("current", "target", "max_moves", "says"),
    [
        ([[0, 1]], [[1, 0]], 1, "max_moves=1 must be 2"),
        ([[0, 1]], [[1, 0, 1]], 2, r"\[1, 2\] and target \[1, 3\]"),
        ([[0, 1, 2]], [[0, 1, 1]], 2, r"target.* without one: \[0 2\]"),
        ([[0, -1]], [[0, 1]], 2, "current; smallest number -1"),
    ],
)
def test_what_does_not_fit_is_printed(current, target, max_moves, says):
    with pytest.raises(ValueError, match=says):
        walk(np.array(current), np.array(target), max_moves)
