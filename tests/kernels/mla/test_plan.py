import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels.mla.plan import (
    BLOCK,
    BLOCKS,
    CUT,
    FIRST,
    KEYS,
    PIECE_CELLS,
    SEQUENCE,
    plan_mla_decode,
)

LENGTHS = st.sampled_from([1, 3, 16]).flatmap(
    lambda batch: st.lists(
        st.one_of(st.integers(0, 200), st.sampled_from([0, 64, 4096, 30_000])),
        min_size=batch,
        max_size=batch,
    )
)


@functools.partial(jax.jit, static_argnames="workers")
def compiled(lengths, workers):
    return plan_mla_decode(lengths, workers=workers)


def make(lengths, workers):
    return jax.tree.map(np.asarray, compiled(jnp.array(lengths, jnp.int32), workers))


def pieces_of(plan, worker):
    return plan.pieces[plan.starts[worker] : plan.starts[worker + 1]]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=st.sampled_from([1, 7, 132]))
def test_every_block_is_in_one_piece_of_one_worker(lengths, workers):
    plan = make(lengths, workers)
    assert plan.starts[0] == 0 and (np.diff(plan.starts) >= 0).all()
    assert plan.starts[-1] == plan.first_piece[-1] <= len(lengths) + workers - 1
    for s, length in enumerate(lengths):
        pieces = plan.pieces[plan.first_piece[s] : plan.first_piece[s + 1]]
        assert (pieces[:, SEQUENCE] == s).all() and (pieces[:, CUT] == (len(pieces) > 1)).all()
        ends = np.cumsum(pieces[:, BLOCKS])
        assert pieces[:, FIRST].tolist() == [0, *ends[:-1]] and ends[-1] == -(-length // BLOCK)
        assert (pieces[:, KEYS] == length - pieces[:, FIRST] * BLOCK).all()
        assert (s in plan.cut) == (len(pieces) > 1)
        # a sequence without keys is a piece of its own, and no other piece is empty
        assert len(pieces) == 1 or pieces[:, BLOCKS].min() > 0


@settings(max_examples=50, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=st.sampled_from([1, 7, 132]))
def test_sequences_that_are_cut_come_first(lengths, workers):
    cut = make(lengths, workers).cut
    count = (cut >= 0).sum()
    assert (np.diff(cut[:count]) > 0).all() and (cut[count:] == -1).all()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=st.sampled_from([1, 7, 132]))
def test_no_worker_has_more_than_its_share(lengths, workers):
    plan = make(lengths, workers)
    share = -(-sum(-(-n // BLOCK) + PIECE_CELLS for n in lengths) // workers)
    for worker in range(workers):
        blocks = pieces_of(plan, worker)[:, BLOCKS]
        # one piece's own cells may lie in the stretch before
        assert blocks.sum() + PIECE_CELLS * (len(blocks) - 1) <= share


def test_equal_sequences_that_fill_the_workers_are_not_cut():
    plan = make([4096] * 66, 66)
    assert plan.starts.tolist() == list(range(67)) and not plan.pieces[:66, CUT].any()


@pytest.mark.parametrize(
    ("lengths", "workers", "says"),
    [
        (jnp.zeros((2, 2), jnp.int32), 4, r"lengths is int32\[2, 2\]"),
        (jnp.zeros(2), 4, r"lengths is float32\[2\]"),
        (jnp.zeros(0, jnp.int32), 4, r"lengths is int32\[0\]"),
        (jnp.zeros(2, jnp.int32), 0, "workers=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_printed(lengths, workers, says):
    with pytest.raises(ValueError, match=f"plan_mla_decode: {says}"):
        plan_mla_decode(lengths, workers=workers)
