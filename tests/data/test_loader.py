import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.data.loader import batch_at, permute


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_visits_all_once(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_keys_give_different_orders():
    orders = {tuple(permute(i, 50, key) for i in range(50)) for key in range(20)}
    assert len(orders) == 20


@given(tokens=st.integers(30, 400), length=st.integers(1, 12), batch=st.integers(1, 5),
       seed=st.integers(0, 2**40))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_window_of_an_epoch_comes_once(tokens, length, batch, seed):
    stream = np.arange(tokens)
    windows = (tokens - 1) // length - 1
    steps = -(-2 * windows // batch)
    rows = np.concatenate([
        batch_at(stream, step=s, batch=batch, length=length, seed=seed) for s in range(steps)
    ])  # fmt: skip
    assert (np.diff(rows, axis=1) == 1).all()  # each row is one run of the stream
    for epoch in (rows[:windows], rows[windows : 2 * windows]):
        starts = np.sort(epoch[:, 0])
        assert (np.diff(starts) == length).all() and starts[0] < length


def test_a_step_is_a_pure_function():
    tokens = np.arange(5000)
    args = {"step": 17, "batch": 4, "length": 16, "seed": 3}
    np.testing.assert_array_equal(batch_at(tokens, **args), batch_at(tokens, **args))
    for name, value in (("step", 18), ("seed", 4)):
        assert (batch_at(tokens, **args) != batch_at(tokens, **{**args, name: value})).any()


def test_the_order_is_the_one_that_runs_were_trained_with():
    """Golden: a change of the order would change every resumed run."""
    rows = batch_at(np.arange(1000), step=3, batch=5, length=10, seed=7)
    np.testing.assert_array_equal(rows[:, 0], GOLDEN)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="20 tokens are too few for sequences of length=10: 21"):
        batch_at(np.arange(20), step=0, batch=1, length=10, seed=0)
    batch_at(np.arange(21), step=0, batch=1, length=10, seed=0)


@pytest.mark.parametrize("wrong", [{"step": -1}, {"batch": 0}, {"length": 0}], ids=str)
def test_sizes_that_make_no_sense_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        batch_at(np.arange(100), **{"step": 0, "batch": 1, "length": 4, "seed": 0, **wrong})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_batches_are_int32_whatever_the_stream(dtype):
    rows = batch_at(np.full(100, 255, dtype), step=0, batch=3, length=7, seed=0)
    assert rows.shape == (3, 8)
    assert rows.dtype == np.int32
    assert (rows == 255).all()


def test_epochs_move_the_windows():
    tokens = np.arange(1000)  # 98 windows of 10
    firsts = [batch_at(tokens, step=98 * e, batch=98, length=10, seed=0)[:, 0] for e in range(8)]
    assert len({first.min() for first in firsts}) > 3


GOLDEN = [775, 845, 835, 425, 45]
